"""Attention by the compiled extension (csrc/attention/cached.h): a layer in one call."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float32, Int, Int64
from torch import Tensor

from sixfold.kernels._groups import (
    DTYPES,
    NO_MASK,
    address,
    check_heads,
    contiguous_pages,
    mask_group,
    numbers_group,
    page_code,
    pages_group,
)
from sixfold.kernels._native import compiled
from sixfold.kernels._operation import plain
from sixfold.kernels.attention.merge import Partial
from sixfold.kernels.attention.parts import attend_parts
from sixfold.kernels.attention.remembered import remembered, token_groups
from sixfold.kernels.types import Coding, Mask, Pages, Past, Softmax, Tokens

_cpu = compiled()

# Long chunks are matrix products: the matrix library's for what is not compressed.
MAX_QUERIES = 16


def attention(
    query: Float[Tensor, "batch heads queries key_dim"],
    tokens: Sequence[Tokens],
    past: Past,
    keys: Coding,
    values: Coding,
    position: Int64[Tensor, " batch"],
    softmax: Softmax,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """See `sixfold.kernels.attention.attention`."""
    if not _native(query, tokens, past):
        return attend_parts(page_attention, query, tokens, past, keys, values, position, softmax)
    scaling, mask, sliding_window, softcap, sinks = softmax
    batch, heads, queries, _ = query.shape
    kv_heads, dims, dtype = past.key_map.mean.shape[1], (keys.dim, values.dim), query.dtype
    if query.is_neg() or query._is_zerotensor():
        query = plain(query)
    # Kept until the call returns: an address does not keep what was converted.
    query, _readable, mask_numbers = query.contiguous(), None, NO_MASK
    if mask is not None:
        _readable, mask_numbers = mask_group(mask, batch, heads, queries)
    if sinks is not None:
        sinks = sinks.float().contiguous()
    copies: list[Tensor] = []
    before = remembered(past, keys, values, batch, dtype, copies)
    recent = token_groups(tokens, batch, kv_heads, dims, dtype, copies)
    out = query.new_empty(batch, heads, queries, values.dim)
    _cpu.attention(
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


def _native(query: Tensor, tokens: Sequence[Tokens], past: Past) -> bool:
    """Whether one call takes them: dtypes the extension knows, few queries."""
    dtype = query.dtype
    if query.shape[2] > MAX_QUERIES or dtype not in DTYPES:
        return False
    return all([x.dtype is dtype for part in (*past.kept, *tokens) for x in part[:2]])


def page_attention(
    query: Float32[Tensor, "batch heads queries key_dim"],
    pages: Pages,
    keys: Coding,
    values: Coding,
    first_token: Int[Tensor, "batch queries"],
    *,
    logit_offset: Float32[Tensor, "batch heads queries"] | None = None,
    mask: Mask | None = None,
    softcap: float | None = None,
) -> Partial:
    """See `sixfold.kernels.attention.parts.PageAttention`."""
    batch, heads, queries, _ = query.shape
    kv_heads = pages.pool.key_codes.shape[1]
    check_heads(heads, kv_heads)
    # Kept until the call returns: an address does not keep what `contiguous` has made.
    query, first = query.contiguous(), first_token.to(torch.int64).contiguous()
    copies: list[Tensor] = []
    tables = pages._replace(starts=pages.starts + pages.first, first=0)
    pages = contiguous_pages(tables, copies)
    offset = None if logit_offset is None else logit_offset.contiguous()
    _readable, mask_numbers = None, NO_MASK
    if mask is not None:
        _readable, mask_numbers = mask_group(mask, batch, heads, queries)
    out = torch.empty(batch, heads, queries, values.dim, dtype=torch.float32, device="cpu")
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device="cpu")
    _cpu.page_attention(
        (batch, kv_heads, heads // kv_heads * queries, queries),
        address("query", query, torch.float32, (batch, heads, queries, keys.dim)),
        pages_group(pages, batch, kv_heads, keys, values),
        page_code(keys, "key"),
        page_code(values, "value"),
        address("first_token", first, torch.int64, (batch, queries)),
        0
        if offset is None
        else address("logit_offset", offset, torch.float32, (batch, heads, queries)),
        mask_numbers,
        softcap or 0.0,
        out.data_ptr(),
        lse.data_ptr(),
        torch.get_num_threads(),
    )
    return Partial(out, lse)
