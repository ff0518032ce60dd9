"""Attention over a compressed layer in one call of the extension (csrc/attention/cached.h)."""

from collections.abc import Sequence
from operator import is_

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from sixfold.kernels._groups import (
    DTYPES,
    PagesGroup,
    code_group,
    contiguous_pages,
    map_group,
    mask_group,
    pages_group,
    rotation_group,
    tokens_group,
)
from sixfold.kernels._native import address, compiled
from sixfold.kernels.cached_attention import reference
from sixfold.kernels.types import Coding, KeyMap, Pages, Tokens

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
    *,
    position: Int64[Tensor, " batch"],
    start: Int64[Tensor, " batch"],
    scaling: float,
    mask: Bool[Tensor, "#batch #heads queries kv"]
    | Float[Tensor, "#batch #heads queries kv"]
    | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sink_logits: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """See `sixfold.kernels.cached_attention.cached_attention`."""
    batch, heads, queries, _ = query.shape
    held = [x for part in tokens for x in (part.keys, part.values)]
    if (
        queries > MAX_QUERIES
        or query.dtype not in DTYPES
        or any(x.dtype is not query.dtype for x in held)
        or (torch.is_grad_enabled() and any(x.requires_grad for x in (query, *held)))
    ):
        return reference.cached_attention(
            query,
            tokens,
            pages,
            keys,
            values,
            key_map,
            position=position,
            start=start,
            scaling=scaling,
            mask=mask,
            sliding_window=sliding_window,
            softcap=softcap,
            sink_logits=sink_logits,
        )
    kv_heads, dims = key_map.mean.shape[1], (keys.dim, values.dim)
    query = query.contiguous()
    # Kept until the call returns: an address does not keep what was converted.
    _readable, mask_numbers = mask_group(mask, batch, heads, queries)
    sinks = None if sink_logits is None else sink_logits.float().contiguous()
    tokens = [_contiguous(part) for part in tokens]
    out = query.new_empty(batch, heads, queries, values.dim)
    _cpu.cached_attention(
        (batch, heads, kv_heads, queries, DTYPES[query.dtype], sliding_window or 0),
        address("query", query, query.dtype, (batch, heads, queries, keys.dim)),
        out.data_ptr(),
        [tokens_group(part, batch, kv_heads, dims, query.dtype) for part in tokens],
        [_pages(part, batch, kv_heads, keys, values) for part in pages],
        (
            rotation_group(keys.dim, keys.turns, keys.factor),
            code_group(keys.dim, keys.bits, keys.centroids, "key"),
        ),
        (
            rotation_group(values.dim, values.turns, values.factor),
            code_group(values.dim, values.bits, values.centroids, "value"),
        ),
        map_group(key_map, batch, kv_heads, keys.dim),
        address("position", position, torch.int64, (batch,)),
        address("start", start, torch.int64, (batch,)),
        scaling,
        mask_numbers,
        softcap or 0.0,
        0 if sinks is None else address("sink_logits", sinks, torch.float32, (heads,)),
        torch.get_num_threads(),
    )
    return out


def _contiguous(part: Tokens) -> Tokens:
    if part.keys.stride(-1) == 1 and part.values.stride(-1) == 1:
        return part
    return part._replace(keys=part.keys.contiguous(), values=part.values.contiguous())


def _pages(part: Pages, batch: int, kv_heads: int, keys: Coding, values: Coding) -> PagesGroup:
    key = (batch, kv_heads, *keys[3:5], *values[3:5], part.first)
    tensors = (*part.pool, *part[1:4])
    # What is remembered is that shapes fit. The memory of a tensor may move (`share_memory_`).
    pointers = tuple([x.data_ptr() for x in tensors])
    held, moved, kept, found = part.memo.get(key, ((), (), None, None))
    if found is None or moved != pointers or not all(map(is_, held, tensors)):
        kept = contiguous_pages(part)
        found = pages_group(kept, batch, kv_heads, keys, values)
        part.memo[key] = tensors, pointers, kept, found
    group: PagesGroup = found
    return group
