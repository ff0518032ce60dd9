"""Decoding in plain PyTorch."""

import torch
from jaxtyping import Float, Float16, Float32, Int64, UInt8
from torch import Tensor

from sixfold.kernels._codewords import expand
from sixfold.kernels._narrow import narrow
from sixfold.kernels._tables import check_map, check_table
from sixfold.kernels._tiles import page_tiles, tiles
from sixfold.kernels.rotate.reference import rotate
from sixfold.kernels.trellis import reference as trellis
from sixfold.kernels.types import Coding, KeyMap
from sixfold.packing import PAGE_TOKENS, Bits, Layout, decode_scale, from_pages


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
    codes: UInt8[Tensor, "slots heads page_bytes"],
    scales: Float16[Tensor, "slots heads page_tokens"],
    slots: Int64[Tensor, "batch n_pages"],
    coding: Coding,
    layout: Layout,
    dtype: torch.dtype,
    key_map: KeyMap | None = None,
) -> Float[Tensor, "batch heads tokens {coding.dim}"]:
    """See `sixfold.kernels.decode.decode_pages`."""
    (batch, n_pages), heads, dim = slots.shape, codes.shape[1], coding.dim
    check_table("slots", slots, len(codes))
    if key_map is not None:
        check_map(key_map, batch)
    maps = None if key_map is None else key_map.of_sequences()
    vectors = torch.empty(batch, heads, n_pages, PAGE_TOKENS, dim, dtype=dtype, device=codes.device)
    for rows, columns in page_tiles(batch, n_pages, heads * PAGE_TOKENS * dim):
        where = slots[rows, columns]
        expanded = expand_pages(codes[where], scales[where], coding, layout)
        tile = rotate(expanded, coding.turns, coding.factor, inverse=True)
        if maps is not None:
            tile = tile / maps.scale[rows, None, :, None] + maps.mean[rows, None, :, None]
        vectors[rows, :, columns] = narrow(tile.transpose(1, 2), dtype)
    return vectors.flatten(2, 3)


def expand_pages(
    codes: UInt8[Tensor, "*b page_bytes"],
    scales: Float16[Tensor, "*b page_tokens"],
    coding: Coding,
    layout: Layout,
) -> Float32[Tensor, "*b page_tokens {coding.dim}"]:
    """See `sixfold.kernels.decode.expand_pages`."""
    rows = from_pages(codes, *coding.row, layout)
    if coding.code == "trellis":
        vectors = trellis.expand(rows, coding.centroids, dim=coding.dim, bits=coding.bits)
        return vectors * decode_scale(scales)[..., None]
    return _scaled(rows, scales, coding.centroids, coding.dim, coding.bits)


def _scaled(rows: Tensor, scales: Tensor, centroids: Tensor, dim: int, bits: Bits) -> Tensor:
    return expand(rows, centroids, dim=dim, bits=bits) * decode_scale(scales)[..., None]
