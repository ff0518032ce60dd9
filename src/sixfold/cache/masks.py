"""Masks of a host, over the tokens that a layer holds."""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from sixfold.arguments import dense
from sixfold.errors import ShapeError, SixfoldError
from sixfold.kernels._groups import mask_strides
from sixfold.kernels.types import Mask


def check_mask(
    mask: Mask, query: Tensor, held: int, length: int, sliding_window: int | None
) -> None:
    """Columns must be tokens held; only a sliding layer may hold more than is asked for.

    Args:
        mask: Of the newest tokens.
        query: Of the newest tokens, [batch, heads, queries, dim].
        held: Tokens that can still be attended.
        length: Tokens ever seen.
        sliding_window: Tokens a query sees, itself included; None for all.

    Raises:
        SixfoldError: It is no dense tensor, or on another device.
        ShapeError: It is no mask, or for another number of tokens.
    """
    dense("mask", mask)
    if mask.ndim != 4 or not (mask.is_floating_point() or mask.dtype is torch.bool):
        raise ShapeError(
            "mask: expected bool or floating point, [batch or 1, heads or 1, queries, tokens], "
            f"got {mask.dtype} {list(mask.shape)}."
        )
    if mask.device != query.device:
        raise SixfoldError(f"mask is on {mask.device}, this layer on {query.device}: move it.")
    mask_strides(mask, *query.shape[:3])
    visible = held if sliding_window is None else min(held, sliding_window - 1 + mask.shape[2])
    if not visible <= mask.shape[3] <= length:
        raise ShapeError(
            f"expected a mask over {visible} to {length} tokens, as many as the layer "
            f"holds, got one over {mask.shape[3]}: it was made for another cache, or for one "
            "whose layers differed in length."
        )


def fit_mask(
    mask: Mask, tokens: int
) -> Bool[Tensor, "#batch #heads queries fit"] | Float[Tensor, "#batch #heads queries fit"]:
    """The columns of the last `tokens` tokens; those that `mask` does not reach are hidden."""
    missing = tokens - mask.shape[-1]
    if missing <= 0:
        return mask[..., -missing:]
    return with_hidden(mask, missing, 0)


def with_hidden(
    mask: Mask, before: int, after: int
) -> Bool[Tensor, "#batch #heads queries fit"] | Float[Tensor, "#batch #heads queries fit"]:
    """The mask with columns of hidden tokens on both sides."""
    hidden = False if mask.dtype == torch.bool else -torch.inf
    return torch.nn.functional.pad(mask, (before, after), value=hidden)


def valid_tokens(
    mask: Tensor | None, queries: int, batch: int
) -> Bool[Tensor, "batch queries"] | None:
    """Which new tokens are real: a padding token does not even attend to itself."""
    if mask is None:
        return None
    itself = torch.diagonal(mask[:, 0], offset=mask.shape[-1] - queries, dim1=-2, dim2=-1)
    return _attended(itself).expand(batch, -1)


def leading_hidden(mask: Mask) -> Int64[Tensor, " #batch"]:
    """How many of the first tokens no query attends, in any head."""
    return (_attended(mask).any(2).any(1).cumsum(1) == 0).sum(1)


def _attended(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
