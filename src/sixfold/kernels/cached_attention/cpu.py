"""Attention over a compressed layer in one call of the extension (csrc/attention/cached.h)."""

from collections.abc import Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sixfold.kernels._groups import (
    DTYPES,
    NO_MASK,
    address,
    contiguous_pages,
    map_group,
    mask_group,
    numbers_group,
    pages_group,
    side_group,
    tokens_group,
)
from sixfold.kernels._native import compiled
from sixfold.kernels._operation import plain_tokens
from sixfold.kernels.cached_attention import reference
from sixfold.kernels.types import Coding, Past, Softmax, Tokens

_cpu = compiled()

# Long chunks are matrix products: the matrix library's for what is not compressed.
MAX_QUERIES = 16


def cached_attention(
    query: Float[Tensor, "batch heads queries key_dim"],
    tokens: Sequence[Tokens],
    past: Past,
    keys: Coding,
    values: Coding,
    position: Int64[Tensor, " batch"],
    softmax: Softmax,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """See `sixfold.kernels.cached_attention.cached_attention`."""
    scaling, mask, sliding_window, softcap, sinks = softmax
    if not _native(query, tokens, past, mask, sinks):
        return reference.cached_attention(query, tokens, past, keys, values, position, softmax)
    batch, heads, queries, _ = query.shape
    kv_heads, dims, dtype = past.key_map.mean.shape[1], (keys.dim, values.dim), query.dtype
    # Kept until the call returns: an address does not keep what was converted.
    query, _readable, mask_numbers = query.contiguous(), None, NO_MASK
    if mask is not None:
        _readable, mask_numbers = mask_group(mask, batch, heads, queries)
    if sinks is not None:
        sinks = sinks.float().contiguous()
    copies: list[Tensor] = []
    before = _before(past, keys, values, batch, dtype, copies)
    recent = [
        tokens_group(x, batch, kv_heads, dims, dtype, copies) for x in _contiguous(tokens, copies)
    ]
    out = query.new_empty(batch, heads, queries, values.dim)
    _cpu.cached_attention(
        (batch, heads, kv_heads, queries, DTYPES[dtype], sliding_window or 0),
        address("query", query, dtype, (batch, heads, queries, keys.dim)),
        out.data_ptr(),
        before.kept + recent,
        before.pages,
        before.keys,
        before.values,
        before.key_map,
        *numbers_group(batch, ("position",), (position,), copies),
        before.start,
        scaling,
        mask_numbers,
        softcap or 0.0,
        0 if sinks is None else address("sink_logits", sinks, torch.float32, (heads,)),
        torch.get_num_threads(),
    )
    return out


def _native(query: Tensor, tokens: Sequence[Tokens], past: Past, *others: Tensor | None) -> bool:
    """Whether the extension takes them: dtypes it knows, few queries, no gradient."""
    dtype = query.dtype
    if query.shape[2] > MAX_QUERIES or dtype not in DTYPES:
        return False
    vectors = [x for part in (*past.kept, *tokens) for x in part[:2]]
    for x in vectors:
        if x.dtype is not dtype:
            return False
    if not torch.is_grad_enabled():
        return True
    return not any([x is not None and x.requires_grad for x in (query, *vectors, *others)])


class _Before(NamedTuple):
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
    found: _Before


def _before(
    past: Past,
    keys: Coding,
    values: Coding,
    batch: int,
    dtype: torch.dtype,
    copies: list[Tensor],
) -> _Before:
    """What stays from step to step: looked at once, unless memory of it has moved since."""
    of = (*past[:4], keys, values)
    known: _Known | None = past.memo.get(dtype)
    if known is not None and known.batch == batch and all(map(is_, known.of, of)):
        # An address is worth nothing once its memory has moved (`share_memory_`).
        if known.addresses == [x.data_ptr() for x in known.tensors]:
            return known.found
    kv_heads, dims, made = past.key_map.mean.shape[1], (keys.dim, values.dim), len(copies)
    kept = plain_tokens(past.kept)
    if kept is not past.kept:
        copies += [x for part in kept for x in part[:2]]
    pages = [contiguous_pages(part, copies) for part in past.pages]
    found = _Before(
        [tokens_group(x, batch, kv_heads, dims, dtype, copies) for x in _contiguous(kept, copies)],
        [pages_group(part, batch, kv_heads, keys, values) for part in pages],
        side_group(keys, "key"),
        side_group(values, "value"),
        map_group(past.key_map, batch, kv_heads, keys.dim, copies),
        *numbers_group(batch, ("start",), (past.start,), copies),
    )
    # A tensor that had to be copied may be written to: its copy is not the tensor.
    if len(copies) == made:
        tensors = [x for x in _tensors(of) if isinstance(x, Tensor)]
        addresses = [x.data_ptr() for x in tensors]
        past.memo[dtype] = _Known(batch, of, tensors, addresses, found)
    return found


def _tensors(group: Any) -> list[Any]:
    """What tuples of tuples hold."""
    if not isinstance(group, tuple | list):
        return [group]
    return [x for member in group for x in _tensors(member)]


def _contiguous(tokens: Sequence[Tokens], copies: list[Tensor]) -> Sequence[Tokens]:
    """The same with vectors whose coordinates follow each other."""
    if not any([x.keys.stride(3) != 1 or x.values.stride(3) != 1 for x in tokens]):
        return tokens
    made = [Tokens(x.keys.contiguous(), x.values.contiguous(), *x[2:]) for x in tokens]
    copies += [x for part in made for x in part[:2]]
    return made
