"""Masks of a host, over the tokens that a layer holds."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sixfold.cache.code import Mask


def fit_mask(
    mask: Mask, tokens: int
) -> Bool[Tensor, "#batch #heads queries fit"] | Float[Tensor, "#batch #heads queries fit"]:
    """The columns of the last `tokens` tokens; those that `mask` does not reach are hidden."""
    missing = tokens - mask.shape[-1]
    if missing <= 0:
        return mask[..., -missing:]
    hidden = False if mask.dtype == torch.bool else -torch.inf
    return torch.nn.functional.pad(mask, (missing, 0), value=hidden)
