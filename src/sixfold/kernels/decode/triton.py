"""Decoding in Triton: codes are read once, vectors written once."""

from typing import Any

import torch
import triton
from jaxtyping import Float, Float16, Float32, Int64, UInt8
from torch import Tensor

from sixfold.errors import ShapeError
from sixfold.kernels._groups import half_bits
from sixfold.kernels._tables import check_table, sequence_maps
from sixfold.kernels._triton import launch
from sixfold.kernels._triton.decode import decode_kernel, decode_pages_kernel
from sixfold.kernels._triton.operators import operator
from sixfold.kernels.decode import reference
from sixfold.kernels.types import CodeName, Coding, KeyMap
from sixfold.packing import PAGE_TOKENS, Bits, Layout, n_symbols, row_bytes, symbol_bits


def decode(
    rows: UInt8[Tensor, "*b row_bytes"],
    scales: Float16[Tensor, "*b"],
    turns: Float[Tensor, "rounds 2 half"],
    factor: Float[Tensor, "m m"],
    centroids: Float32[Tensor, " levels *pair"],
    *,
    dim: int,
    bits: Bits,
) -> Float32[Tensor, "*b {dim}"]:
    """See `sixfold.kernels.decode.decode`."""
    vectors: Tensor = _decode(rows, scales, turns, factor, centroids, dim, float(bits))
    return vectors


def decode_pages(
    codes: UInt8[Tensor, "slots heads page_bytes"],
    scales: Float16[Tensor, "slots heads page_tokens"],
    slots: Int64[Tensor, "batch n_pages"],
    coding: Coding,
    layout: Layout,
    dtype: torch.dtype,
    key_map: KeyMap | None = None,
) -> Float[Tensor, "batch heads tokens {coding.dim}"]:
    """See `sixfold.kernels.decode.decode_pages`."""
    check_table("slots", slots, len(codes))
    options = coding.dim, float(coding.bits), coding.code, layout, dtype, False
    maps = sequence_maps(key_map, len(slots), codes.shape[1], coding.dim)
    vectors: Tensor = _decode_pages(codes, scales, slots, *maps, *coding[:3], *options)
    return vectors


def expand_pages(
    codes: UInt8[Tensor, "*b page_bytes"],
    scales: Float16[Tensor, "*b page_tokens"],
    coding: Coding,
    layout: Layout,
) -> Float32[Tensor, "*b page_tokens {coding.dim}"]:
    """See `sixfold.kernels.decode.expand_pages`."""
    if scales.shape[-1] != PAGE_TOKENS:
        return reference.expand_pages(codes, scales, coding, layout)
    dim, device = coding.dim, codes.device
    flat, flat_scales = codes.flatten(0, -2), scales.flatten(0, -2)
    slots = torch.arange(len(flat), device=device)[:, None]
    tables = codes.new_empty(0, 2, dim // 2), codes.new_empty(dim, dim), coding.centroids
    options = dim, float(coding.bits), coding.code, layout, torch.float32, True
    out = _decode_pages(flat[:, None], flat_scales[:, None], slots, None, None, *tables, *options)
    vectors: Tensor = out.view(*scales.shape, dim)
    return vectors


def _vectors_shape(
    rows: Tensor,
    scales: Tensor,
    turns: Tensor,
    factor: Tensor,
    centroids: Tensor,
    dim: int,
    bits: float,
) -> Tensor:
    return scales.new_empty((*scales.shape, dim), dtype=torch.float32)


@operator(
    "decode(Tensor rows, Tensor scales, Tensor turns, Tensor factor, Tensor centroids, SymInt dim, "
    "float bits) -> Tensor",
    _vectors_shape,
)
def _decode(
    rows: Tensor,
    scales: Tensor,
    turns: Tensor,
    factor: Tensor,
    centroids: Tensor,
    dim: int,
    bits: float,
) -> Tensor:
    constants = launch.rotation(dim, turns, factor) | launch.codebook(dim, bits, centroids)
    size = row_bytes(n_symbols(dim, bits), symbol_bits(bits))
    if rows.shape != (*scales.shape, size):
        raise ShapeError(f"rows: expected {[*scales.shape, size]}, got {list(rows.shape)}")
    count, tile = scales.numel(), launch.tile(constants)
    out = torch.empty(*scales.shape, dim, dtype=torch.float32, device=rows.device)
    if count:
        decode_kernel[(triton.cdiv(count, tile["N"]),)](
            rows.contiguous(),
            scales.contiguous(),
            turns.contiguous(),
            factor.contiguous(),
            centroids.contiguous(),
            out,
            count,
            SHRINK=launch.shrink(constants),
            **tile,
            **constants,
            **launch.EXACT,
        )
    return out


def _tokens_shape(pages: Tensor, scales: Tensor, slots: Tensor, *arguments: Any) -> Tensor:
    dim, _, _, _, dtype, _ = arguments[5:]
    shape = (slots.shape[0], pages.shape[1], slots.shape[1] * PAGE_TOKENS, dim)
    return pages.new_empty(shape, dtype=dtype)


@operator(
    "decode_pages(Tensor pages, Tensor scales, Tensor slots, Tensor? mean, Tensor? channel_scale, "
    "Tensor turns, Tensor factor, Tensor centroids, SymInt dim, float bits, str code, str layout, "
    "ScalarType dtype, bool rotated) -> Tensor",
    _tokens_shape,
)
def _decode_pages(
    pages: Tensor,
    scales: Tensor,
    slots: Tensor,
    mean: Tensor | None,
    channel_scale: Tensor | None,
    turns: Tensor,
    factor: Tensor,
    centroids: Tensor,
    dim: int,
    bits: float,
    code: CodeName,
    layout: Layout,
    dtype: torch.dtype,
    rotated: bool,
) -> Tensor:
    constants = launch.rotation(dim, turns, factor) | launch.codebook(dim, bits, centroids, code)
    launch.check_pages(pages, scales, dim, bits, code)
    (batch, n_pages), heads = slots.shape, pages.shape[1]
    # The interpreter cuts bfloat16 off where a processor rounds it.
    written = torch.float32 if launch.interpreted() and dtype is torch.bfloat16 else dtype
    shape = (batch, heads, n_pages * PAGE_TOKENS, dim)
    out = torch.empty(shape, dtype=written, device=pages.device)
    grid, tile = launch.page_grid(slots, heads, constants)
    if grid:
        decode_pages_kernel[grid](
            pages,
            scales,
            slots.contiguous(),
            mean,
            channel_scale,
            turns.contiguous(),
            factor.contiguous(),
            centroids.contiguous(),
            out,
            n_pages,
            heads,
            *pages.stride()[:2],
            *scales.stride()[:2],
            HAS_MEAN=mean is not None,
            HAS_SCALE=channel_scale is not None,
            LAYOUT=layout,
            ROTATED=rotated,
            HALF_BITS=half_bits(bits, code),
            SHRINK=launch.shrink(constants),
            **tile,
            **constants,
            **launch.EXACT,
        )
    return out.to(dtype)
