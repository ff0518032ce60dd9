"""Packed codes to a tile of codewords in the columns of `rotate`."""

import triton
import triton.language as tl

from sixfold.kernels._triton import pages, paths
from sixfold.kernels._triton.rotate import coordinates, inside


@triton.jit
def _plane(
    rows, vector, mask, index, symbol, COUNT: tl.constexpr, SYMBOL: tl.constexpr, BITS: tl.constexpr
):
    """`symbol` with the bits of one plane of packed rows appended."""
    start, row = 0, 0
    for digit in tl.static_range(4):
        if SYMBOL & (8 >> digit):
            row += (COUNT * (8 >> digit) + 31) // 32 * 4
            if (8 >> digit) > BITS:
                start += (COUNT * (8 >> digit) + 31) // 32 * 4
    size = (COUNT * BITS + 31) // 32 * 4
    offset = vector[:, None] * row + (start + index % size)[None, :]
    # Padding is found by the remainder and lies in the row.
    byte = tl.load(rows + offset, mask=mask[:, None], other=0).to(tl.int32)
    shift = (index // size * BITS) & 7
    return symbol << BITS | ((byte >> shift[None, :]) & ((1 << BITS) - 1))


@triton.jit
def row_symbols(
    rows,
    vector,
    mask,
    index,
    COUNT: tl.constexpr,
    SYMBOL: tl.constexpr,
):
    """Symbols of packed rows of COUNT, int32 [vectors, columns], that stand at `index`."""
    symbol = tl.zeros([vector.shape[0], index.shape[0]], tl.int32)
    for digit in tl.static_range(4):
        if SYMBOL & (8 >> digit):
            symbol = _plane(rows, vector, mask, index, symbol, COUNT, SYMBOL, 8 >> digit)
    return symbol


@triton.jit
def codewords(
    codes,
    token,
    mask,
    scale,
    centroids,
    SYMBOL: tl.constexpr,
    PAIRED: tl.constexpr,
    HALF_BITS: tl.constexpr,
    LAYOUT: tl.constexpr,
    DIM: tl.constexpr,
    SIZE: tl.constexpr,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """scale·codeword of rows ("rows") or of tokens of a page ("key", "value"); zeros in padding.

    Pages may hold paths of a trellis, of HALF_BITS half bits a coordinate.
    """
    columns = coordinates(SIZE, INNER, WIDTH)
    if LAYOUT == "rows":
        COUNT: tl.constexpr = (DIM + 1) // 2 if PAIRED else DIM
        index = pages.symbol_index(columns, DIM, PAIRED)
        symbol = row_symbols(codes, token, mask, index, COUNT, SYMBOL)
    elif HALF_BITS:
        words = paths.window_words(
            codes, token[:, None], columns[None, :], 1, HALF_BITS, DIM, LAYOUT == "key"
        )
        symbol = paths.state_of(words, 0, HALF_BITS)
    else:
        symbol = pages.symbols(
            codes, token[:, None], columns[None, :], SYMBOL, DIM, PAIRED, LAYOUT == "key"
        )
    level = pages.gathered_levels(centroids, symbol, columns[None, :], DIM, PAIRED)
    level = level * pages.decoded_scale(scale)[:, None]
    return tl.where(inside(DIM, SIZE, INNER, WIDTH)[None, :], level, 0.0)
