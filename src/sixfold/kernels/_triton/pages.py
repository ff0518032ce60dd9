"""Symbols and scales of compressed pages (docs/format.md, sections 1 to 4).

Tiles have a token on one axis and a coordinate on the other: `tokens` and `columns` are index
tensors that broadcast to the tile, so a caller chooses the orientation. Columns of padding, those
at DIM and beyond, need no mask: their bytes are found by a remainder and lie in the page.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def first_plane(symbol_bits):
    """Bits of a symbol's first plane."""
    return 8 if symbol_bits == 8 else 4 if symbol_bits >= 4 else 2 if symbol_bits >= 2 else 1


@triton.jit
def symbol_index(columns, DIM: tl.constexpr, PAIRED: tl.constexpr):
    """The symbol that a coordinate belongs to, modulo padding."""
    if PAIRED:
        return columns % ((DIM + 1) // 2)
    return columns


@triton.jit
def byte_offset(tokens, byte, BYTES: tl.constexpr, KEYS: tl.constexpr):
    """Where in a plane of BYTES bytes a row the given byte of a token's row is."""
    if KEYS:
        return tokens // 16 * (16 * BYTES) + byte // 4 * 64 + tokens % 16 * 4 + byte % 4
    return tokens // 4 * (4 * BYTES) + byte * 4 + tokens % 4


@triton.jit
def plane(
    page,
    tokens,
    columns,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    PAIRED: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Bytes of one plane (uint8 tile), and by how much to shift each to reach its symbol (uint8).

    START is the number of bytes a row takes in the planes before. Four tokens of a value page, or
    four coordinates of a key page, lie in one word: their loads are one load.
    """
    SYMBOLS: tl.constexpr = (DIM + 1) // 2 if PAIRED else DIM
    BYTES: tl.constexpr = (SYMBOLS * WIDTH + 31) // 32 * 4
    index = symbol_index(columns, DIM, PAIRED)
    offset = byte_offset(tokens, index % BYTES, BYTES, KEYS)
    shift = (index // BYTES * WIDTH) & 7
    return tl.load(page + (64 * START + offset)), shift.to(tl.uint8)


@triton.constexpr_function
def row_bytes_before(symbol_bits, number, dim, paired):
    """Bytes a row takes in the planes before plane `number` (1 or 2)."""
    symbols = (dim + 1) // 2 if paired else dim
    first = (symbols * first_plane(symbol_bits) + 31) // 32 * 4
    return first + (symbols * 2 + 31) // 32 * 4 if number == 2 else first


@triton.jit
def symbols(
    page,
    tokens,
    columns,
    SYMBOL_BITS: tl.constexpr,
    DIM: tl.constexpr,
    PAIRED: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Symbols of a tile, int32: those of coordinate pairs appear in both columns."""
    WIDTH: tl.constexpr = first_plane(SYMBOL_BITS)
    byte, shift = plane(page, tokens, columns, 0, WIDTH, DIM, PAIRED, KEYS)
    found = (byte >> shift).to(tl.int32) & ((1 << WIDTH) - 1)
    if SYMBOL_BITS == 6 or SYMBOL_BITS == 7:
        START: tl.constexpr = row_bytes_before(SYMBOL_BITS, 1, DIM, PAIRED)
        byte, shift = plane(page, tokens, columns, START, 2, DIM, PAIRED, KEYS)
        found = found << 2 | ((byte >> shift).to(tl.int32) & 3)
    if SYMBOL_BITS == 3 or SYMBOL_BITS == 5 or SYMBOL_BITS == 7:
        NUMBER: tl.constexpr = 2 if SYMBOL_BITS == 7 else 1
        LAST: tl.constexpr = row_bytes_before(SYMBOL_BITS, NUMBER, DIM, PAIRED)
        byte, shift = plane(page, tokens, columns, LAST, 1, DIM, PAIRED, KEYS)
        found = found << 1 | ((byte >> shift).to(tl.int32) & 1)
    return found


@triton.jit
def gathered_levels(book, symbols, columns, DIM: tl.constexpr, PAIRED: tl.constexpr):
    """Codewords, float32, read from the codebook: exact at every width."""
    if PAIRED:
        return tl.load(book + 2 * symbols + (columns >= (DIM + 1) // 2).to(tl.int32))
    return tl.load(book + symbols)


@triton.jit
def decoded_scale(stored):
    """Inverse of `packing.encode_scale`: the sign bit is a flag."""
    scale = stored.to(tl.float32)
    bits = stored.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
    upper = (bits << 17).to(tl.float32, bitcast=True)
    return tl.where(scale < 0, tl.where(bits < 0x3800, upper, scale * -65536.0), scale)
