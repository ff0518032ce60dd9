"""Encoding in plain PyTorch."""

import math
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Float16, Float32, Float64, Int64, UInt8
from torch import Tensor

from sixfold.kernels._codewords import lookup
from sixfold.kernels._tables import check_map, check_table
from sixfold.kernels._tiles import page_tiles, tiles
from sixfold.kernels.rotate.reference import unnormalized
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
    turns, factor, centroids, bits, dim, scale = coding
    (batch, n_pages), heads = slots.shape, x.shape[1]
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
        packed, stored = _encode(tile, turns, factor, centroids, bits=bits, scale=scale)
        where = slots[rows, columns]
        codes[where] = to_pages(packed, n_symbols(dim, bits), symbol_bits(bits), layout)
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


def rotated_direction(
    x: Float[Tensor, "*b dim"],
    turns: Float[Tensor, "rounds 2 half"],
    factor: Float[Tensor, "m m"],
) -> tuple[Float32[Tensor, "*b dim"], Float64[Tensor, "*b"]]:
    """What is quantized: u = sqrt(dim)·R·x/‖x‖, and its unit ‖x‖/sqrt(dim)."""
    dim = x.shape[-1]
    x, power = _moderate(x)
    # In float64, because vector libraries round a float32 root to one of its two neighbours.
    norm = fold_sum(x * x).double().sqrt().float()
    valid = norm.isfinite() & (norm > 0)
    # The stretch of the unnormalised rotation and the variance of the codebook, in one product.
    stretch = torch.full_like(norm, math.pow(dim, 1 / 2 - len(turns) / 2)) / norm
    rotated = torch.where(valid[..., None], unnormalized(x, turns, factor), 0)
    u = (rotated * torch.where(valid, stretch, 0)[..., None]).contiguous()
    return u, norm.double() / power * dim**-0.5


def _moderate(
    x: Float[Tensor, "*b dim"],
) -> tuple[Float32[Tensor, "*b dim"], Float64[Tensor, "*b"]]:
    """Multiply by a power of two, which is returned too, so that no square over- or underflows."""
    # Codes are discrete: there is no gradient to keep a graph for.
    x = x.detach()
    if x.dtype is torch.float64:
        exponent = torch.frexp(x.abs().amax(-1)).exponent.clamp(-1000, 1000)
        power = torch.ldexp(torch.ones_like(x[..., 0]), -exponent)
        return (x * power[..., None]).float(), power
    x = x.float()
    biased_exponent = x.abs().amax(-1).view(torch.int32) >> 23
    power = ((254 - biased_exponent).clamp(min=1) << 23).view(torch.float32)
    return x * power[..., None], power.double()


def fold_sum(x: Float32[Tensor, "*b dim"]) -> Float32[Tensor, "*b"]:
    """Sum in an order that every backend keeps: halves are added until one number is left.

    Vectors are padded with zeros to a power of two.
    """
    size = 1 << (x.shape[-1] - 1).bit_length()
    x = torch.nn.functional.pad(x, (0, size - x.shape[-1]))
    while size > 1:
        size //= 2
        x = x[..., :size] + x[..., size:]
    return x.squeeze(-1)


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


def correction(u: Tensor, q: Tensor, scale: Scale) -> Tensor:
    """What multiplies ‖x‖/sqrt(dim), in float64; 1 or finite for a zero vector."""
    if scale == "norm":
        return torch.ones((), dtype=torch.float64, device=u.device)
    product = fold_sum(u * q).double()
    if scale == "optimal":
        return product / fold_sum(q * q).double()
    # ⟨u,u⟩ is dim but for rounding.
    product = torch.where(product > 0, product, 1)
    return torch.full_like(product, u.shape[-1]) / product
