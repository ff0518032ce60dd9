"""What a layer is given must fit what it holds."""

from typing import Any

import torch
from torch import Tensor

from sixfold.arguments import FLOATS, floating
from sixfold.cache.dense import DenseTokens
from sixfold.errors import ShapeError, SixfoldError


def check_query(query: Any, keys: Tensor, held: int) -> None:
    """Refuse what is no query of the newest of `held` tokens, whose last ones have `keys`.

    Raises:
        SixfoldError: It is no dense tensor of a floating dtype, or on another device.
        ShapeError: It is for another batch, other heads or more tokens.
    """
    batch, heads, _, dim = keys.shape
    # What `floating` asks first, and nearly always all there is to ask.
    plain = type(query) is Tensor and query.dtype in FLOATS and query.layout is torch.strided
    if not plain or query.is_nested or not query.data_ptr():
        floating("query", query)
    shape = query.shape
    fits = len(shape) == 4 and shape[0] == batch and shape[3] == dim
    if not fits or shape[1] % heads or not 0 < shape[2] <= held:
        raise ShapeError(
            f"query: expected [{batch}, a multiple of {heads} heads, 1 to {held} tokens, "
            f"{dim}], got {list(query.shape)}."
        )
    if query.device != keys.device:
        raise SixfoldError(f"query is on {query.device}, this layer on {keys.device}: move it.")


def check_same(held: DenseTokens, new: DenseTokens) -> None:
    """Refuse new tokens that are not of the batch, heads, dims, dtypes and device of those held.

    Raises:
        ShapeError: They differ.
    """
    alike = True
    for old, fresh in ((held.keys, new.keys), (held.values, new.values)):
        (batch, heads, _, dim), shape = old.shape, fresh.shape
        alike &= shape[0] == batch and shape[1] == heads and shape[3] == dim
        alike &= old.dtype is fresh.dtype and old.device == fresh.device
    if alike:
        return
    if (had := _dtypes(held)) != (got := _dtypes(new)) and held.keys.device == new.keys.device:
        raise ShapeError(
            f"this layer holds keys and values of {had[0]} and {had[1]}, got {got[0]} and "
            f"{got[1]}: convert what it holds, as cache.to(dtype={got[0]}) does, when the "
            "dtype of the model changes."
        )
    for name in ("keys", "values"):
        expected, given = _kind(getattr(held, name)), _kind(getattr(new, name))
        if expected != given:
            raise ShapeError(
                f"{name}: this layer holds [batch, heads, dim], dtype, device = {expected}, got "
                f"{given}; reset the cache or select its batch rows before changing the batch."
            )


def _kind(x: Tensor) -> tuple[int, int, int, torch.dtype, torch.device]:
    batch, heads, _, dim = x.shape
    return batch, heads, dim, x.dtype, x.device


def _dtypes(tokens: DenseTokens) -> tuple[torch.dtype, torch.dtype]:
    return tokens.keys.dtype, tokens.values.dtype
