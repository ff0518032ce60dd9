"""Decoding in plain PyTorch."""

import torch
from jaxtyping import Float, Float16, Float32, Int64, UInt8
from torch import Tensor

from sixfold.kernels._codewords import expand
from sixfold.kernels._narrow import narrow
from sixfold.kernels._tiles import page_tiles, tiles
from sixfold.kernels.rotate.reference import rotate
from sixfold.packing import (
    PAGE_TOKENS,
    Bits,
    Layout,
    decode_scale,
    from_pages,
    n_symbols,
    symbol_bits,
)


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
    flat_scales = scales.reshape(-1)
    flat_rows = rows.reshape(len(flat_scales), rows.shape[-1])
    vectors = torch.empty(len(flat_rows), dim, dtype=torch.float32, device=rows.device)
    for tile in tiles(len(vectors), dim):
        expanded = _scaled(flat_rows[tile], flat_scales[tile], centroids, dim, bits)
        vectors[tile] = rotate(expanded, turns, factor, inverse=True)
    return vectors.view(*scales.shape, dim)


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
    (batch, n_pages), heads = slots.shape, pages.shape[1]
    vectors = torch.empty(batch, heads, n_pages, PAGE_TOKENS, dim, dtype=dtype, device=pages.device)
    for rows, columns in page_tiles(batch, n_pages, heads * PAGE_TOKENS * dim):
        where = slots[rows, columns]
        expanded = expand_pages(
            pages[where], scales[where], centroids, dim=dim, bits=bits, layout=layout
        )
        tile = rotate(expanded, turns, factor, inverse=True)
        if channel_scale is not None:
            tile = tile / channel_scale[rows, None, :, None].float()
        if mean is not None:
            tile = tile + mean[rows, None, :, None].float()
        vectors[rows, :, columns] = narrow(tile.transpose(1, 2), dtype)
    return vectors.flatten(2, 3)


def expand_pages(
    pages: UInt8[Tensor, "*b page_bytes"],
    scales: Float16[Tensor, "*b page_tokens"],
    centroids: Float32[Tensor, " levels *pair"],
    *,
    dim: int,
    bits: Bits,
    layout: Layout,
) -> Float32[Tensor, "*b page_tokens {dim}"]:
    """See `sixfold.kernels.decode.expand_pages`."""
    rows = from_pages(pages, n_symbols(dim, bits), symbol_bits(bits), layout)
    return _scaled(rows, scales, centroids, dim, bits)


def _scaled(rows: Tensor, scales: Tensor, centroids: Tensor, dim: int, bits: Bits) -> Tensor:
    return expand(rows, centroids, dim=dim, bits=bits) * decode_scale(scales)[..., None]
