"""Decoding by the compiled extension."""

import torch
from jaxtyping import Float, Float16, Float32, Int64, UInt8
from torch import Tensor

from sixfold.kernels._native import address, compiled
from sixfold.kernels.decode.reference import expand_pages
from sixfold.kernels.encode.cpu import affine_group, affine_maps, code_group, pages_group
from sixfold.kernels.rotate.cpu import DTYPES, rotation_group
from sixfold.packing import PAGE_TOKENS, Bits, Layout, n_symbols, row_bytes, symbol_bits

_cpu = compiled()

__all__ = ["decode", "decode_pages", "expand_pages"]


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
    rotation, code = rotation_group(dim, turns, factor), code_group(dim, bits, centroids)
    rows, scales = rows.contiguous(), scales.contiguous()
    size = row_bytes(n_symbols(dim, bits), symbol_bits(bits))
    codes = address("rows", rows, torch.uint8, (*scales.shape, size))
    stored = address("scales", scales, torch.float16, scales.shape)
    out = torch.empty(*scales.shape, dim, dtype=torch.float32)
    n, threads = scales.numel(), torch.get_num_threads()
    _cpu.decode(rotation, code, codes, stored, out.data_ptr(), n, threads)
    return out


def decode_pages(
    pages: UInt8[Tensor, "slots heads page_bytes"],
    scales: Float16[Tensor, "slots heads page_tokens"],
    slots: Int64[Tensor, "batch n_pages"],
    mean: Float[Tensor, "batch heads dim"] | None,
    channel_scale: Float[Tensor, "batch heads dim"] | None,
    turns: Float[Tensor, "rounds 2 half"],
    factor: Float[Tensor, "m m"],
    centroids: Float32[Tensor, " levels *pair"],
    *,
    dim: int,
    bits: Bits,
    layout: Layout,
    dtype: torch.dtype,
) -> Float[Tensor, "batch heads tokens {dim}"]:
    """See `sixfold.kernels.decode.decode_pages`."""
    # Named, because an address does not keep what `contiguous` may have made.
    pages, scales, slots = pages.contiguous(), scales.contiguous(), slots.contiguous()
    read = pages_group(pages, scales, slots, dim, bits)
    rotation, code = rotation_group(dim, turns, factor), code_group(dim, bits, centroids, layout)
    (batch, n_pages), heads = slots.shape, pages.shape[1]
    maps = affine_maps(mean, channel_scale, (batch, heads, dim))
    written = dtype if dtype in DTYPES else torch.float32
    out = torch.empty(batch, heads, n_pages * PAGE_TOKENS, dim, dtype=written)
    strides = [stride * out.element_size() for stride in out.stride()[:3]]
    _cpu.decode_pages(
        rotation,
        code,
        affine_group(maps),
        read,
        (out.data_ptr(), DTYPES[written], *strides),
        torch.get_num_threads(),
    )
    return out.to(dtype)
