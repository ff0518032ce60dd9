"""Attention over a compressed layer in one call of the extension (csrc/attention/cached.h)."""

from collections.abc import Sequence
from operator import is_

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sixfold.kernels._groups import (
    DTYPES,
    NO_MASK,
    PagesGroup,
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
from sixfold.kernels.cached_attention import reference
from sixfold.kernels.types import Coding, KeyMap, Pages, Softmax, Tokens

_cpu = compiled()

# Long chunks are matrix products: the matrix library's for what is not compressed.
MAX_QUERIES = 16


def cached_attention(
    query: Float[Tensor, "batch heads queries key_dim"],
    tokens: Sequence[Tokens],
    pages: Sequence[Pages],
    keys: Coding,
    values: Coding,
    key_map: KeyMap,
    position: Int64[Tensor, " batch"],
    start: Int64[Tensor, " batch"],
    softmax: Softmax,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """See `sixfold.kernels.cached_attention.cached_attention`."""
    mask, sinks = softmax.mask, softmax.sink_logits
    if not _native(query, tokens, mask, sinks):
        return reference.cached_attention(
            query, tokens, pages, keys, values, key_map, position, start, softmax
        )
    batch, heads, queries, _ = query.shape
    kv_heads, dims, dtype = key_map.mean.shape[1], (keys.dim, values.dim), query.dtype
    # Kept until the call returns: an address does not keep what was converted.
    query, _readable, mask_numbers = query.contiguous(), None, NO_MASK
    if mask is not None:
        _readable, mask_numbers = mask_group(mask, batch, heads, queries)
    if sinks is not None:
        sinks = sinks.float().contiguous()
    if any([part.keys.stride(3) != 1 or part.values.stride(3) != 1 for part in tokens]):
        tokens = [Tokens(x.keys.contiguous(), x.values.contiguous(), *x[2:]) for x in tokens]
    kept: list[Tensor] = []
    out = query.new_empty(batch, heads, queries, values.dim)
    _cpu.cached_attention(
        (batch, heads, kv_heads, queries, DTYPES[dtype], softmax.sliding_window or 0),
        address("query", query, dtype, (batch, heads, queries, keys.dim)),
        out.data_ptr(),
        [tokens_group(part, batch, kv_heads, dims, dtype, kept) for part in tokens],
        [_pages(part, batch, kv_heads, keys, values, kept) for part in pages],
        side_group(keys, "key"),
        side_group(values, "value"),
        map_group(key_map, batch, kv_heads, keys.dim, kept),
        *numbers_group(batch, ("position", "start"), (position, start), kept),
        softmax.scaling,
        mask_numbers,
        softmax.softcap or 0.0,
        0 if sinks is None else address("sink_logits", sinks, torch.float32, (heads,)),
        torch.get_num_threads(),
    )
    return out


def _native(query: Tensor, tokens: Sequence[Tokens], *others: Tensor | None) -> bool:
    """Whether the extension takes them: dtypes it knows, few queries, no gradient."""
    dtype, grad = query.dtype, torch.is_grad_enabled()
    if query.shape[2] > MAX_QUERIES or dtype not in DTYPES or (grad and query.requires_grad):
        return False
    if grad and any([x is not None and x.requires_grad for x in others]):
        return False
    for part in tokens:
        for x in part[:2]:
            if x.dtype is not dtype or (grad and x.requires_grad):
                return False
    return True


def _pages(
    part: Pages, batch: int, kv_heads: int, keys: Coding, values: Coding, copies: list[Tensor]
) -> PagesGroup:
    key = (batch, kv_heads, *keys[3:5], keys[6], *values[3:5], values[6], part.first)
    tensors = (*part.pool, *part[1:4])
    # As in `side_group`.
    pointers = [(x.data_ptr(), x.shape, x.stride()) for x in tensors]
    held, moved, found = part.memo.get(key, ((), (), None))
    if found is None or moved != pointers or not all(map(is_, held, tensors)):
        kept = contiguous_pages(part)
        found = pages_group(kept, batch, kv_heads, keys, values)
        # A table that had to be copied may be written to: its copy is not the table.
        if all(map(is_, kept[1:4], part[1:4])):
            part.memo[key] = tensors, pointers, found
        else:
            copies += kept[1:4]
    group: PagesGroup = found
    return group
