"""What of a compressed layer its attention kernel sees."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sixfold.cache.code import Mask
from sixfold.cache.dense import DenseTokens
from sixfold.cache.pages import PagedHistory
from sixfold.cache.prefix import Prefix
from sixfold.kernels.types import Pages, Tokens


def fit_mask(
    mask: Mask, tokens: int
) -> Bool[Tensor, "#batch #heads queries fit"] | Float[Tensor, "#batch #heads queries fit"]:
    """The columns of the last `tokens` tokens; those that `mask` does not reach are hidden."""
    missing = tokens - mask.shape[-1]
    if missing <= 0:
        return mask[..., -missing:]
    hidden = False if mask.dtype == torch.bool else -torch.inf
    return torch.nn.functional.pad(mask, (missing, 0), value=hidden)


def dense_parts(prefix: Prefix, window: DenseTokens, first: int) -> list[Tokens]:
    """The sinks, and the window, whose first token has position `first`."""
    origin = torch.full_like(prefix.end, first)
    return [*prefix.part(), Tokens(window.keys, window.values, origin, prefix.end)]


def coded_parts(history: PagedHistory) -> list[Pages]:
    """Every run of pages."""
    parts, first = [], 0
    for run in history.runs:
        parts.append(run.pages(first))
        first += run.tokens
    return parts
