"""Symbols to the bit planes of `sixfold.packing`, stored as 32-bit words."""

import triton
import triton.language as tl

_PAGE_TOKENS = tl.constexpr(64)


@triton.jit
def _plane(
    symbol, COUNT: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr, SIZE: tl.constexpr
):
    """A plane's bytes [N, columns], zero behind `SIZE`: bits SHIFT to SHIFT + BITS of COUNT."""
    lanes: tl.constexpr = 8 // BITS
    index = tl.arange(0, symbol.shape[1])
    part = tl.where((index < COUNT)[None, :], (symbol >> SHIFT) & ((1 << BITS) - 1), 0)
    if lanes * SIZE == symbol.shape[1]:
        part = tl.reshape(part, [symbol.shape[0], lanes, SIZE])
        return tl.sum(part << (tl.arange(0, lanes) * BITS)[None, :, None], 1)
    else:
        columns: tl.constexpr = 4 if symbol.shape[1] < 4 * lanes else symbol.shape[1] // lanes
        byte = tl.arange(0, columns)
        packed = tl.zeros([symbol.shape[0], columns], tl.int32)
        for lane in tl.static_range(lanes):
            source = lane * SIZE + byte
            inside = (byte < SIZE) & (source < COUNT)
            source = tl.where(inside, source, 0)[None, :]
            value = tl.gather(part, tl.broadcast_to(source, [symbol.shape[0], columns]), 1)
            packed |= tl.where(inside[None, :], value, 0) << (lane * BITS)
        return packed


@triton.jit
def _store_plane(out, plane, token, mask, start, row, SIZE: tl.constexpr, LAYOUT: tl.constexpr):
    """Write a plane that takes `SIZE` bytes, `start` bytes into rows of `row` bytes."""
    tokens: tl.constexpr = plane.shape[0]
    columns: tl.constexpr = plane.shape[1]
    shift = tl.arange(0, 4) * 8
    if LAYOUT == "value":
        groups = tl.reshape(plane, [tokens // 4, 4, columns]) << shift[None, :, None]
        byte = tl.arange(0, columns)[None, :]
        # Every fourth token, without a load: tokens of a tile are consecutive.
        group = tl.min(tl.reshape(token, [tokens // 4, 4]), 1)[:, None] // 4
        where = _PAGE_TOKENS // 4 * start + group * SIZE + byte
        tl.store(out + where, tl.sum(groups, 1), mask=byte < SIZE)
    else:
        words = tl.reshape(plane, [tokens, columns // 4, 4]) << shift[None, None, :]
        word = tl.arange(0, columns // 4)[None, :]
        token = token[:, None]
        if LAYOUT == "key":
            where = _PAGE_TOKENS // 4 * start + (token // 16 * (SIZE // 4) + word) * 16 + token % 16
        else:
            where = token * (row // 4) + start // 4 + word
        tl.store(out + where, tl.sum(words, 2), mask=mask[:, None] & (word < SIZE // 4))


@triton.jit
def _pack(
    out,
    symbol,
    token,
    mask,
    COUNT: tl.constexpr,
    SYMBOL: tl.constexpr,
    BITS: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """The plane of `BITS` bits, behind those of more."""
    start, row = 0, 0
    for digit in tl.static_range(4):
        if SYMBOL & (8 >> digit):
            row += (COUNT * (8 >> digit) + 31) // 32 * 4
            if (8 >> digit) > BITS:
                start += (COUNT * (8 >> digit) + 31) // 32 * 4
    SIZE: tl.constexpr = (COUNT * BITS + 31) // 32 * 4
    plane = _plane(symbol, COUNT, SYMBOL & (BITS - 1), BITS, SIZE)
    _store_plane(out, plane, token, mask, start, row, SIZE, LAYOUT)


@triton.jit
def store_symbols(
    out,
    symbol,
    token,
    mask,
    SYMBOL: tl.constexpr,
    PAIRED: tl.constexpr,
    DIM: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """Pack the symbols of each row of a tile and write them.

    Args:
        out: int32 pointer to the rows ("rows"), or to the page ("key", "value").
        symbol: int32 [N, columns]; those behind the last are arbitrary.
        token: Row, or token of the page, of each row of the tile, consecutive.
        mask: Which rows to write; all of a page are written.
    """
    COUNT: tl.constexpr = (DIM + 1) // 2 if PAIRED else DIM
    # Planes of 8, 4, 2 and 1 bits, in this order: the binary digits of SYMBOL.
    for digit in tl.static_range(4):
        if SYMBOL & (8 >> digit):
            _pack(out, symbol, token, mask, COUNT, SYMBOL, 8 >> digit, LAYOUT)
