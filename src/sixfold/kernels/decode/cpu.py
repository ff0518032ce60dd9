"""Decoding by the compiled extension."""

import torch
from jaxtyping import Float, Float16, Float32, Int64, UInt8
from torch import Tensor

from sixfold.kernels._groups import DTYPES, address, code_group, rotation_group
from sixfold.kernels._native import compiled
from sixfold.kernels._tables import sequence_maps
from sixfold.kernels.decode.reference import expand_pages
from sixfold.kernels.encode.cpu import affine_group, page_group
from sixfold.kernels.trellis.cpu import path_group
from sixfold.kernels.types import Coding, KeyMap
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
    out = torch.empty(*scales.shape, dim, dtype=torch.float32, device="cpu")
    n, threads = scales.numel(), torch.get_num_threads()
    _cpu.decode(rotation, code, codes, stored, out.data_ptr(), n, threads)
    return out


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
    # Named, because an address does not keep what `contiguous` may have made.
    slots = slots.contiguous()
    (batch, n_pages), heads, dim = slots.shape, codes.shape[1], coding.dim
    maps = sequence_maps(key_map, batch, heads, dim)
    written = dtype if dtype in DTYPES else torch.float32
    out = torch.empty(batch, heads, n_pages * PAGE_TOKENS, dim, dtype=written, device="cpu")
    strides = [stride * out.element_size() for stride in out.stride()[:3]]
    paths = coding.code == "trellis"
    (_cpu.decode_path_pages if paths else _cpu.decode_pages)(
        rotation_group(dim, coding.turns, coding.factor),
        (path_group if paths else code_group)(dim, coding.bits, coding.centroids, layout),
        affine_group(maps),
        page_group(codes, scales, slots, coding),
        (out.data_ptr(), DTYPES[written], *strides),
        torch.get_num_threads(),
    )
    return out.to(dtype)
