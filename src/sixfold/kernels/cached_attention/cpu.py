"""Attention over a compressed layer in one call of the compiled extension (csrc/cached.h)."""

from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from sixfold.kernels._native import address, compiled
from sixfold.kernels.attention.arguments import page_sizes
from sixfold.kernels.attention.cpu import mask_arguments
from sixfold.kernels.cached_attention import reference
from sixfold.kernels.cached_attention.parts import Coding, Pages, Tokens
from sixfold.kernels.rotate.cpu import DTYPES, rotation_group
from sixfold.packing import PAGE_TOKENS

_cpu = compiled()

# Long chunks are matrix products: the matrix library's for what is not compressed.
MAX_QUERIES = 16
_TENSORS = Pages._fields.index("first")


def cached_attention(
    query: Float[Tensor, "batch heads queries key_dim"],
    tokens: Sequence[Tokens],
    pages: Sequence[Pages],
    keys: Coding,
    values: Coding,
    *,
    mean: Float32[Tensor, "batch kv_heads key_dim"],
    channel_scale: Float32[Tensor, "batch kv_heads key_dim"],
    position: int,
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
            mean=mean,
            channel_scale=channel_scale,
            position=position,
            start=start,
            scaling=scaling,
            mask=mask,
            sliding_window=sliding_window,
            softcap=softcap,
            sink_logits=sink_logits,
        )
    kv_heads, dims = mean.shape[1], (keys.dim, values.dim)
    page_bytes = page_sizes(keys.dim, keys.bits)[2], page_sizes(values.dim, values.bits)[2]
    query = query.contiguous()
    # Kept until the call returns: an address does not keep what was converted.
    _readable, mask_numbers = mask_arguments(mask, batch, heads, queries)
    sinks = None if sink_logits is None else sink_logits.float().contiguous()
    parts = [_contiguous(part) for part in tokens]
    out = query.new_empty(batch, heads, queries, values.dim)
    _cpu.cached_attention(
        (batch, heads, kv_heads, queries, DTYPES[query.dtype], position, sliding_window or 0),
        address("query", query, query.dtype, (batch, heads, queries, keys.dim)),
        out.data_ptr(),
        _side("keys", keys),
        _side("values", values),
        [_tokens(part, (batch, kv_heads), dims, query.dtype) for part in parts],
        [_pages(part, batch, kv_heads, page_bytes) for part in pages],
        address("mean", mean, torch.float32, (batch, kv_heads, keys.dim)),
        address("channel_scale", channel_scale, torch.float32, (batch, kv_heads, keys.dim)),
        address("start", start, torch.int64, (batch,)),
        scaling,
        mask_numbers,
        softcap or 0.0,
        0 if sinks is None else address("sink_logits", sinks, torch.float32, (heads,)),
        torch.get_num_threads(),
    )
    return out


def _side(name: str, coding: Coding) -> tuple[int, int, int, int, int, int, int, int]:
    turns, factor, centroids, bits, dim = coding
    width, axes, _, book = page_sizes(dim, bits)
    return (
        *rotation_group(dim, turns, factor),
        width,
        axes,
        address(f"{name}.centroids", centroids, torch.float32, book),
    )


def _contiguous(part: Tokens) -> Tokens:
    if part.keys.is_contiguous() and part.values.is_contiguous():
        return part
    return part._replace(keys=part.keys.contiguous(), values=part.values.contiguous())


def _tokens(
    part: Tokens, heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype
) -> tuple[int, int, int, int, int, int]:
    batch, count = heads[0], part.keys.shape[2]
    return (
        address("tokens.keys", part.keys, dtype, (*heads, count, dims[0])),
        address("tokens.values", part.values, dtype, (*heads, count, dims[1])),
        count,
        address("tokens.first", part.first, torch.int64, (batch,)),
        address("tokens.start", part.start, torch.int64, (batch,)),
        address("tokens.stop", part.stop, torch.int64, (batch,)),
    )


def _pages(part: Pages, batch: int, kv_heads: int, page_bytes: tuple[int, int]) -> tuple[int, ...]:
    key = (batch, kv_heads, *page_bytes)
    tensors: tuple[Any, ...] = part[:_TENSORS]
    # What is remembered is that shapes fit. The memory of a tensor may move (`share_memory_`).
    pointers = tuple([x.data_ptr() for x in tensors])
    held, moved, found = part.memo.get(key, ((), (), ()))
    if moved != pointers or not all(map(is_, held, tensors)):
        found = _addresses(part, *key)
        part.memo[key] = tensors, pointers, found
    return (*found, part.first)


def _addresses(
    part: Pages, batch: int, kv_heads: int, key_bytes: int, value_bytes: int
) -> tuple[int, ...]:
    slots, count = part.key_pages.shape[0], part.block_table.shape[1]
    pool = slots, kv_heads
    return (
        address("key_pages", part.key_pages, torch.uint8, (*pool, key_bytes)),
        address("key_scales", part.key_scales, torch.float16, (*pool, PAGE_TOKENS)),
        address("value_pages", part.value_pages, torch.uint8, (*pool, value_bytes)),
        address("value_scales", part.value_scales, torch.float16, (*pool, PAGE_TOKENS)),
        slots,
        address("block_table", part.block_table, torch.int64, (batch, count)),
        address("starts", part.starts, torch.int64, (count,)),
        address("lengths", part.lengths, torch.int64, (count,)),
        count,
    )
