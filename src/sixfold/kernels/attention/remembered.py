"""What the compiled extension knows of a `Past`: looked at once, then remembered with it."""

from collections.abc import Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sixfold.kernels._groups import (
    contiguous_pages,
    map_group,
    numbers_group,
    pages_group,
    side_group,
    tokens_group,
)
from sixfold.kernels.types import Coding, Past, Tokens


class Before(NamedTuple):
    """A `Past` as the extension takes it."""

    kept: list[tuple[Any, ...]]
    pages: list[Any]
    keys: tuple[Any, ...]
    values: tuple[Any, ...]
    key_map: tuple[int, ...]
    start: int


class _Known(NamedTuple):
    """What was found out about a `Past`, of whom, and where their tensors were."""

    batch: int
    of: tuple[Any, ...]
    tensors: list[Tensor]
    addresses: list[int]
    found: Before


def remembered(
    past: Past,
    keys: Coding,
    values: Coding,
    batch: int,
    dtype: torch.dtype,
    copies: list[Tensor],
) -> Before:
    """What stays from step to step: looked at once, unless memory of it has moved since."""
    # Lists may change: what is in them is compared.
    of = (*past.pages, past.key_map, past.start, *past.kept, keys, values)
    known: _Known | None = past.memo.get(dtype)
    if known is not None and known.batch == batch and len(known.of) == len(of):
        # An address is worth nothing once its memory has moved (`share_memory_`).
        if all(map(is_, known.of, of)) and known.addresses == [
            *map(Tensor.data_ptr, known.tensors)
        ]:
            return known.found
    kv_heads, dims, made = past.key_map.mean.shape[1], (keys.dim, values.dim), len(copies)
    pages = [contiguous_pages(part, copies) for part in past.pages]
    found = Before(
        token_groups(past.kept, batch, kv_heads, dims, dtype, copies),
        [pages_group(part, batch, kv_heads, keys, values) for part in pages],
        side_group(keys, "key"),
        side_group(values, "value"),
        map_group(past.key_map, batch, kv_heads, keys.dim, copies),
        *numbers_group(batch, ("start",), (past.start,), copies),
    )
    # A tensor that had to be copied may be written to: its copy is not the tensor.
    if len(copies) == made:
        tensors = [x for x in _tensors(of) if isinstance(x, Tensor)]
        past.memo[dtype] = _Known(batch, of, tensors, [*map(Tensor.data_ptr, tensors)], found)
    return found


def _tensors(group: Any) -> list[Any]:
    """What tuples of tuples hold."""
    if not isinstance(group, tuple | list):
        return [group]
    return [x for member in group for x in _tensors(member)]


def token_groups(
    tokens: Sequence[Tokens],
    batch: int,
    kv_heads: int,
    dims: tuple[int, int],
    dtype: torch.dtype,
    copies: list[Tensor],
) -> list[tuple[Any, ...]]:
    """Uncompressed parts as the extension takes them; `copies` keep what had to be made for it."""
    return [tokens_group(x, batch, kv_heads, dims, dtype, copies) for x in tokens]
