"""The bit order: how indices become bytes, rows become pages and scales become float16.

A *symbol* is one codebook index. Integer bit widths have one symbol per coordinate; 2.5 and
3.5 bits have one symbol of 5 or 7 bits per coordinate pair, where pair i is coordinates
(i, i + ceil(dim / 2)), so that kernels split a vector in halves instead of shuffling it.

Symbols are stored in *planes* of 1, 2, 4 or 8 bits, most significant plane first. Byte k of a
plane of B bytes holds symbols k, k + B, k + 2B, ..., lowest bits first. Thus every byte belongs
to one vector, and unpacking is a shift and a mask at every width.
"""

import math
from functools import lru_cache
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Float16, Float32, Int64, UInt8
from torch import Tensor

from sixfold.arguments import choice
from sixfold.errors import SixfoldError

# `float` alone would make run-time checkers refuse a plain `4`.
Bits: TypeAlias = int | float
Layout: TypeAlias = Literal["key", "value"]

BITS: tuple[Bits, ...] = (1, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8)
PAGE_TOKENS = 64

_PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
# One 32-bit word: four interleaved dimensions never straddle two planes.
_PLANE_ALIGNMENT = 4
_FLOAT16_MAX = 65504.0
_LARGE_SCALE_UNIT = 65536.0
_LEAST_HALF, _LEAST_SCALE = 2.0**-18, 2.0**-96
# Bits of 0.5 as float16: numbers in units of 2**16 are larger than that.
_UPPER_END = 0x3800


def check_bits(bits: Any, name: str = "bits") -> Bits:
    """Refuse bit widths that have no codebook; returns the one of `BITS` that it is.

    Raises:
        SixfoldError: `bits` is not one of `BITS`.
    """
    if type(bits) in (int, float) and bits in BITS:
        return bits  # type: ignore[no-any-return]
    return choice(name, bits, BITS)


def is_paired(bits: Bits) -> bool:
    """Whether one symbol stands for a pair of coordinates (2.5 and 3.5 bits)."""
    # Of other libraries' numbers too, the answer is Python's.
    bits = check_bits(bits)
    return bits != int(bits)


def symbol_bits(bits: Bits) -> int:
    """Bits per symbol: `bits`, or twice that where symbols stand for pairs."""
    return int(2 * bits) if is_paired(bits) else int(bits)


def n_symbols(dim: int, bits: Bits) -> int:
    """Symbols per vector; the last pair of an odd `dim` is padded with a zero coordinate."""
    return (dim + 1) // 2 if is_paired(bits) else dim


def planes(symbol_bits: int) -> tuple[int, ...]:
    """Widths of the bit planes of a symbol, most significant first.

    Raises:
        SixfoldError: `symbol_bits` is not 1 to 8.
    """
    if symbol_bits not in _PLANES:
        raise SixfoldError(f"symbol_bits must be 1 to 8, got {symbol_bits!r}")
    return _PLANES[symbol_bits]


def plane_bytes(n_symbols: int, width: int) -> int:
    """Bytes of one plane of `n_symbols` symbols, a multiple of 4."""
    return -(-n_symbols * width // (8 * _PLANE_ALIGNMENT)) * _PLANE_ALIGNMENT


def row_bytes(n_symbols: int, symbol_bits: int) -> int:
    """Bytes of one vector's codes: its planes, one after another."""
    return sum(plane_bytes(n_symbols, width) for width in planes(symbol_bits))


@lru_cache(typed=True)
def _split_sizes(n_symbols: int, symbol_bits: int) -> tuple[int, ...]:
    return tuple(plane_bytes(n_symbols, width) for width in planes(symbol_bits))


def _shifts(width: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, width, dtype=torch.uint8, device=device)[:, None]


def _pack_plane(values: Tensor, width: int) -> Tensor:
    size = plane_bytes(values.shape[-1], width)
    padding = size * 8 // width - values.shape[-1]
    padded = torch.nn.functional.pad(values, (0, padding))
    lanes = torch.unflatten(padded, -1, (8 // width, size))
    return (lanes << _shifts(width, values.device)).sum(-2, dtype=torch.uint8)


def _unpack_plane(plane: Tensor, n_symbols: int, width: int) -> Tensor:
    if width == 8:
        return plane[..., :n_symbols]
    lanes = (plane[..., None, :] >> _shifts(width, plane.device)) & ((1 << width) - 1)
    return lanes.flatten(-2)[..., :n_symbols]


def pack(indices: UInt8[Tensor, "*b n"], symbol_bits: int) -> UInt8[Tensor, "*b row_bytes"]:
    """Pack indices below `2**symbol_bits` into rows; unused bits are zero."""
    rows, remaining = [], symbol_bits
    for width in planes(symbol_bits):
        remaining -= width
        rows.append(_pack_plane((indices >> remaining) & ((1 << width) - 1), width))
    return torch.cat(rows, dim=-1)


def unpack(
    rows: UInt8[Tensor, "*b row_bytes"], n_symbols: int, symbol_bits: int
) -> UInt8[Tensor, "*b {n_symbols}"]:
    """Inverse of `pack`."""
    widths = planes(symbol_bits)
    parts = rows.split(_split_sizes(n_symbols, symbol_bits), dim=-1)
    symbols = _unpack_plane(parts[0], n_symbols, widths[0])
    for part, width in zip(parts[1:], widths[1:], strict=True):
        symbols = (symbols << width) | _unpack_plane(part, n_symbols, width)
    return symbols


def _tile(plane: Tensor, layout: Layout) -> Tensor:
    if layout == "value":
        return torch.unflatten(plane, -2, (-1, 4)).transpose(-2, -1).flatten(-3)
    words = torch.unflatten(torch.unflatten(plane, -1, (-1, 4)), -3, (-1, 16))
    return words.transpose(-3, -2).flatten(-4)


def _untile(page: Tensor, tokens: int, layout: Layout) -> Tensor:
    if layout == "value":
        groups = torch.unflatten(page, -1, (tokens // 4, -1, 4))
        return groups.transpose(-2, -1).flatten(-3, -2)
    words = torch.unflatten(page, -1, (tokens // 16, -1, 16, 4))
    return words.transpose(-3, -2).flatten(-2).flatten(-3, -2)


def to_pages(
    rows: UInt8[Tensor, "*b tokens row_bytes"], n_symbols: int, symbol_bits: int, layout: Layout
) -> UInt8[Tensor, "*b page_bytes"]:
    """Permute the rows of a page (a multiple of 16 tokens) into the order its kernel reads.

    Planes stay apart, in order. Within a plane of B bytes a row:

    - `"key"`: [tokens / 16, B / 4, 16 tokens, 4 bytes]: one 64-byte register holds the same four
      bytes of 16 tokens, so a dot product adds up without crossing lanes.
    - `"value"`: [tokens / 4, B, 4 tokens]: a weighted sum over four tokens is one dot product.
    """
    parts = rows.split(_split_sizes(n_symbols, symbol_bits), dim=-1)
    return torch.cat([_tile(part, layout) for part in parts], dim=-1)


def from_pages(
    pages: UInt8[Tensor, "*b page_bytes"], n_symbols: int, symbol_bits: int, layout: Layout
) -> UInt8[Tensor, "*b tokens row_bytes"]:
    """Inverse of `to_pages`."""
    tokens, parts = _page_planes(pages, n_symbols, symbol_bits)
    return torch.cat([_untile(part, tokens, layout) for part in parts], dim=-1)


def key_rows(
    pages: UInt8[Tensor, "pages page_bytes"],
    page: Int64[Tensor, " n"],
    token: Int64[Tensor, " n"],
    n_symbols: int,
    symbol_bits: int,
) -> UInt8[Tensor, "n row_bytes"]:
    """Rows of single tokens of pages in the key layout, without taking whole pages apart."""
    (tokens, parts), found = _page_planes(pages, n_symbols, symbol_bits), []
    for part in parts:
        words = torch.unflatten(part, -1, (tokens // 16, -1, 16, 4))
        found.append(words[page, token // 16, :, token % 16].flatten(1))
    return torch.cat(found, dim=-1)


def _page_planes(pages: Tensor, n_symbols: int, symbol_bits: int) -> tuple[int, tuple[Tensor, ...]]:
    """Tokens of a page, and the planes one after another."""
    sizes = _split_sizes(n_symbols, symbol_bits)
    tokens = pages.shape[-1] // sum(sizes)
    return tokens, pages.split([tokens * size for size in sizes], dim=-1)


def encode_scale(x: Float[Tensor, "*b"]) -> Float16[Tensor, "*b"]:
    """Store non-negative scales in 16 bits, whatever their size.

    The sign bit is a flag: scales from 2**-18 to 65504 are stored as they are, larger ones negated
    and in units of 2**16, and those beyond either end as the upper bits of a float32. Relative
    error at most 2**-11 from 6.1e-5 to 4.29e9, and 2**-7 from 2**-96 to 1.5e29, where scales
    saturate; below 2**-96 they become zero. NaN and infinity become NaN, so that a vector that was
    not finite decodes to NaN, visibly, and spoils no other.
    """
    x = x.detach()
    large = -(x / _LARGE_SCALE_UNIT).clamp(max=_FLOAT16_MAX)
    stored = torch.where(x > _FLOAT16_MAX, large, x)
    # Filled as float16: which NaN a conversion gives depends on torch and on the place in a tensor.
    half = stored.to(torch.float16).masked_fill(~x.isfinite(), math.nan)
    small = (x >= _LEAST_SCALE) & (x < _LEAST_HALF)
    huge = (x > _FLOAT16_MAX * _LARGE_SCALE_UNIT) & x.isfinite()
    upper = (x.float().view(torch.int32) + (1 << 16)) >> 17
    flagged = (upper.clamp(max=_UPPER_END - 1) - (1 << 15)).to(torch.int16).view(torch.float16)
    return torch.where(small | huge, flagged, half)


def decode_scale(stored: Float16[Tensor, "*b"]) -> Float32[Tensor, "*b"]:
    """Inverse of `encode_scale`."""
    scale = stored.float()
    bits = stored.view(torch.int16).int() & 0x7FFF
    large, upper = scale * -_LARGE_SCALE_UNIT, (bits << 17).view(torch.float32)
    flagged = torch.where(bits < _UPPER_END, upper, large)
    return torch.where(scale < 0, flagged, scale)
