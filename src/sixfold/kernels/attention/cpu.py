"""Attention over compressed pages by the compiled extension (csrc/attention.h)."""

import torch
from jaxtyping import Bool, Float, Float16, Float32, Int, UInt8
from torch import Tensor

from sixfold.errors import ShapeError
from sixfold.kernels._native import address, compiled, memory
from sixfold.kernels.attention import reference
from sixfold.kernels.attention.arguments import check_heads, mask_strides, page_sizes
from sixfold.kernels.attention.merge import Partial
from sixfold.packing import PAGE_TOKENS, Bits

_cpu = compiled()

_NO_MASK = (0, 0, 0, 0, 0, 0, 0.0)


def page_attention(
    query: Float32[Tensor, "batch heads queries key_dim"],
    key_pages: UInt8[Tensor, "slots kv_heads key_bytes"],
    key_scales: Float16[Tensor, "slots kv_heads page"],
    value_pages: UInt8[Tensor, "slots kv_heads value_bytes"],
    value_scales: Float16[Tensor, "slots kv_heads page"],
    block_table: Int[Tensor, "batch pages"],
    page_starts: Int[Tensor, " pages"],
    page_lengths: Int[Tensor, " pages"],
    first_token: Int[Tensor, "batch queries"],
    key_centroids: Float32[Tensor, "..."],
    value_centroids: Float32[Tensor, "..."],
    *,
    key_bits: Bits,
    value_bits: Bits,
    value_dim: int,
    logit_offset: Float32[Tensor, "batch heads queries"] | None = None,
    mask: Bool[Tensor, "#batch #heads queries kv"]
    | Float[Tensor, "#batch #heads queries kv"]
    | None = None,
    softcap: float | None = None,
) -> Partial:
    """See `sixfold.kernels.attention.page_attention`."""
    if query.requires_grad and torch.is_grad_enabled():
        return reference.page_attention(
            query,
            key_pages,
            key_scales,
            value_pages,
            value_scales,
            block_table,
            page_starts,
            page_lengths,
            first_token,
            key_centroids,
            value_centroids,
            key_bits=key_bits,
            value_bits=value_bits,
            value_dim=value_dim,
            logit_offset=logit_offset,
            mask=mask,
            softcap=softcap,
        )
    batch, heads, queries, key_dim = query.shape
    slots, kv_heads = key_pages.shape[:2]
    pages = block_table.shape[1]
    check_heads(heads, kv_heads)
    # Kept until the call returns: an address does not keep what `contiguous` has made.
    query, table, first = query.contiguous(), _int64(block_table), _int64(first_token)
    starts, lengths = _int64(page_starts), _int64(page_lengths)
    offset = None if logit_offset is None else logit_offset.contiguous()
    mask, mask_numbers = mask_arguments(mask, batch, heads, queries)
    out = torch.empty(batch, heads, queries, value_dim, dtype=torch.float32)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32)
    _cpu.page_attention(
        batch,
        kv_heads,
        heads // kv_heads * queries,
        queries,
        pages,
        slots,
        address("query", query, torch.float32, (batch, heads, queries, key_dim)),
        *_side("key", key_pages, key_scales, key_centroids, slots, kv_heads, key_dim, key_bits),
        *_side(
            "value",
            value_pages,
            value_scales,
            value_centroids,
            slots,
            kv_heads,
            value_dim,
            value_bits,
        ),
        address("block_table", table, torch.int64, (batch, pages)),
        address("page_starts", starts, torch.int64, (pages,)),
        address("page_lengths", lengths, torch.int64, (pages,)),
        address("first_token", first, torch.int64, (batch, queries)),
        0
        if offset is None
        else address("logit_offset", offset, torch.float32, (batch, heads, queries)),
        *mask_numbers,
        0.0 if softcap is None else softcap,
        out.data_ptr(),
        lse.data_ptr(),
        torch.get_num_threads(),
    )
    return Partial(out, lse)


def _side(
    name: str,
    pages: Tensor,
    scales: Tensor,
    centroids: Tensor,
    slots: int,
    kv_heads: int,
    dim: int,
    bits: Bits,
) -> tuple[int, int, int, int, int, int]:
    width, axes, size, book = page_sizes(dim, bits)
    return (
        address(f"{name}_pages", pages, torch.uint8, (slots, kv_heads, size)),
        address(f"{name}_scales", scales, torch.float16, (slots, kv_heads, PAGE_TOKENS)),
        address(f"{name}_centroids", centroids, torch.float32, book),
        dim,
        width,
        axes,
    )


def _int64(x: Tensor) -> Tensor:
    return x.to(torch.int64).contiguous()


def mask_arguments(
    mask: Tensor | None, batch: int, heads: int, queries: int
) -> tuple[Tensor | None, tuple[int, int, int, int, int, int, float]]:
    """The mask in a dtype the extension reads, and how: broadcast axes have stride 0."""
    if mask is None:
        return None, _NO_MASK
    additive = mask.dtype != torch.bool
    if additive and not mask.is_floating_point():
        raise ShapeError(
            f"mask: expected bool or floating point, got {mask.dtype}; pass mask != 0."
        )
    # Hosts write "never" as the lowest finite number of a narrow dtype, see dense.apply_mask.
    never = torch.finfo(mask.dtype).min / 2 if additive else 0.0
    readable = mask.to(torch.float32 if additive else torch.bool).contiguous()
    strides = mask_strides(readable, batch, heads, queries)
    return readable, (1 + additive, memory("mask", readable), *strides, mask.shape[-1], never)
