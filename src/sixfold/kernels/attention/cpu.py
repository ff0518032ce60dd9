"""Attention over compressed pages by the compiled extension (csrc/attention/attention.h)."""

import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor

from sixfold.kernels._groups import (
    NO_MASK,
    address,
    check_heads,
    contiguous_pages,
    mask_group,
    page_code,
    pages_group,
)
from sixfold.kernels._native import compiled
from sixfold.kernels.attention.merge import Partial
from sixfold.kernels.types import Coding, Pages

_cpu = compiled()


def page_attention(
    query: Float32[Tensor, "batch heads queries key_dim"],
    pages: Pages,
    keys: Coding,
    values: Coding,
    first_token: Int[Tensor, "batch queries"],
    *,
    logit_offset: Float32[Tensor, "batch heads queries"] | None = None,
    mask: Bool[Tensor, "#batch #heads queries kv"]
    | Float[Tensor, "#batch #heads queries kv"]
    | None = None,
    softcap: float | None = None,
) -> Partial:
    """See `sixfold.kernels.attention.page_attention`."""
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
