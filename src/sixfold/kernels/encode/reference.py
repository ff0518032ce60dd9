"""Encoding in plain PyTorch."""

import math
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Float16, Float32, Int64, UInt8
from torch import Tensor

from sixfold.kernels._codewords import lookup
from sixfold.kernels._direction import correction, rotated_direction
from sixfold.kernels._tables import check_map, check_table
from sixfold.kernels._tiles import page_tiles, tiles
from sixfold.kernels.trellis import reference as trellis
from sixfold.kernels.types import Coding, KeyMap, Pool, Scale
from sixfold.packing import (
    PAGE_TOKENS,
    Bits,
    Layout,
    encode_scale,
    is_paired,
    n_symbols,
    pack,
    row_bytes,
    symbol_bits,
    to_pages,
)
from sixfold.pair_grids import PAIR_MIRRORS


def encode(
    x: Float[Tensor, "*b dim"],
    turns: Float[Tensor, "rounds 2 half"],
    factor: Float[Tensor, "m m"],
    centroids: Float32[Tensor, " levels *pair"],
    *,
    bits: Bits,
    scale: Scale,
) -> tuple[UInt8[Tensor, "*b row_bytes"], Float16[Tensor, "*b"]]:
    """See `sixfold.kernels.encode.encode`."""
    batch, dim = x.shape[:-1], x.shape[-1]
    vectors = x.reshape(batch.numel(), dim)
    size = row_bytes(n_symbols(dim, bits), symbol_bits(bits))
    rows = torch.empty(len(vectors), size, dtype=torch.uint8, device=x.device)
    scales = torch.empty(len(vectors), dtype=torch.float16, device=x.device)
    for tile in tiles(len(vectors), dim):
        rows[tile], scales[tile] = _encode(
            vectors[tile], turns, factor, centroids, bits=bits, scale=scale
        )
    return rows.view(*batch, size), scales.view(batch)


def encode_pages(
    x: Float[Tensor, "batch heads tokens dim"],
    slots: Int64[Tensor, "batch n_pages"],
    coding: Coding,
    layout: Layout,
    codes: UInt8[Tensor, "slots heads page_bytes"],
    scales: Float16[Tensor, "slots heads page_tokens"],
    key_map: KeyMap | None = None,
) -> None:
    """See `sixfold.kernels.encode.encode_pages`."""
    (batch, n_pages), heads, dim = slots.shape, x.shape[1], coding.dim
    check_table("slots", slots, len(codes))
    if key_map is not None:
        check_map(key_map, batch)
    maps = None if key_map is None else key_map.of_sequences()
    # [batch, n_pages, heads, PAGE_TOKENS, dim]
    paged = torch.unflatten(x, 2, (-1, PAGE_TOKENS)).transpose(1, 2)
    for rows, columns in page_tiles(batch, n_pages, heads * PAGE_TOKENS * dim):
        tile = paged[rows, columns]
        if maps is not None:
            tile = (tile - maps.mean[rows, None, :, None]) * maps.scale[rows, None, :, None]
        encoder = trellis.encode if coding.code == "trellis" else _encode
        packed, stored = encoder(tile, *coding[:3], bits=coding.bits, scale=coding.scale)
        where = slots[rows, columns]
        codes[where] = to_pages(packed, *coding.row, layout)
        scales[where] = stored


def store_sides(
    encode_pages: Callable[..., None],
    keys: Float[Tensor, "batch heads tokens key_dim"],
    values: Float[Tensor, "batch heads tokens value_dim"],
    slots: Int64[Tensor, "batch n_pages"],
    pool: Pool,
    key_coding: Coding,
    value_coding: Coding,
    key_map: KeyMap | None = None,
) -> None:
    """`store_pages` by a backend's own `encode_pages`, one side after the other."""
    encode_pages(keys, slots, key_coding, "key", pool.key_codes, pool.key_scales, key_map)
    encode_pages(values, slots, value_coding, "value", pool.value_codes, pool.value_scales)


store_pages = partial(store_sides, encode_pages)


def _encode(
    x: Tensor, turns: Tensor, factor: Tensor, centroids: Tensor, *, bits: Bits, scale: Scale
) -> tuple[Tensor, Tensor]:
    u, unit = rotated_direction(x, turns, factor)
    indices = _nearest_pairs(u, centroids, bits) if is_paired(bits) else _nearest(u, centroids)
    stored = unit * correction(u, lookup(indices, centroids, x.shape[-1]), scale)
    return pack(indices, symbol_bits(bits)), encode_scale(stored)


def _nearest(u: Tensor, centroids: Tensor) -> Tensor:
    boundaries = (centroids[1:] + centroids[:-1]) / 2
    return torch.bucketize(u, boundaries, out_int32=True).to(torch.uint8)


def _nearest_pairs(u: Tensor, centroids: Tensor, bits: Bits) -> Tensor:
    """Fold each pair by its signs, which are the top bits of the index, then search the rest."""
    symbol = symbol_bits(bits)
    x, y = torch.nn.functional.pad(u, (0, u.shape[-1] % 2)).chunk(2, dim=-1)
    index = (x < 0).to(torch.uint8) << (symbol - 1)
    x = x.abs()
    if PAIR_MIRRORS[symbol] == 2:
        index |= (y < 0).to(torch.uint8) << (symbol - 2)
        y = y.abs()
    points = centroids[: 1 << (symbol - PAIR_MIRRORS[symbol])]
    best = torch.full_like(x, math.inf)
    nearest = torch.zeros_like(index)
    for number, (px, py) in enumerate(points.tolist()):
        distance = (x - px).square() + (y - py).square()
        closer = distance < best
        best = torch.where(closer, distance, best)
        nearest = torch.where(closer, number, nearest)
    return index | nearest
