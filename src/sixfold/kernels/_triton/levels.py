"""Levels of a page's codes for matrix products: float16, four codes at a time by byte permutes.

Byte k of a row's first plane (docs/format.md) holds the symbols k, k + B, k + 2B, ... A tile of
bytes therefore becomes one tile of levels a *slice*: shift, mask, look up, all within the byte, so
that nothing moves between columns, and the caller permutes its other operand instead.

Inline PTX takes a register of four bytes and gives four float16 levels in two registers. `prmt`
selects four bytes from eight: the codebook is kept as bytes, low ones and high ones apart.

    2 bits and 1    four levels are eight bytes: one `prmt` gives two levels   1.75 a code
    3 bits          eight levels are two tables of eight bytes                 3.25 a code
    4 bits          eight magnitudes, and the sign from the highest bit        2.25 a code

(instructions a code). Other widths read the codebook from memory, and so does Triton's interpreter,
which runs no PTX; the tests run the instructions below in Python.
"""

import triton
import triton.language as tl

from sixfold.kernels._triton.pages import byte_offset, first_plane
from sixfold.kernels._triton.paths import WINDOWS, path_levels

# lop3 tables, of the inputs' own.
_A, _B, _C = 0xF0, 0xCC, 0xAA
_FOLD = (_A ^ ~_B) & _C & 0xFF
_SIGN = (_A ^ (~_B & _C)) & 0xFF
_CHOOSE = (_A & _C | _B & ~_C) & 0xFF
_AND_OR = (_A & _B | _C) & 0xFF


def _shift(target: str, source: str, right: int) -> str:
    name, count = ("shr", right) if right >= 0 else ("shl", -right)
    return f"{name}.b32 {target}, {source}, {count};"


def _block(registers: str, lines: list[str]) -> str:
    return "\n".join(["{", f".reg .b32 {registers};", *lines, "}"])


def _tables(first: int) -> tuple[str, ...]:
    # Four elements of an int32 argument are four registers with the same number.
    return tuple(f"${first + 4 * i}" for i in range(4))


def _few_levels(symbol_bits: int, shift: int) -> str:
    """$0, $1 from $2 at one or two bits: bytes of a selector are (4 + symbol, symbol)."""
    low, _, high, _ = _tables(3)
    mask = (1 << symbol_bits) - 1
    return _block(
        "x, y",
        [
            _shift("x", "$2", shift),
            _shift("y", "$2", shift - 4),
            f"lop3.b32 x, x, y, 0x0f0f0f0f, {_CHOOSE:#x};",
            f"lop3.b32 x, x, {0x11111111 * mask:#x}, 0x40404040, {_AND_OR:#x};",
            f"prmt.b32 $0, {low}, {high}, x;",
            "shr.b32 x, x, 16;",
            f"prmt.b32 $1, {low}, {high}, x;",
        ],
    )


def _three_bits(shift: int) -> str:
    """$0, $1 from $2, two bits of each symbol, and $3, the byte with the last one, of which $4 is
    the bit."""
    low, low_2, high, high_2 = _tables(5)
    return _block(
        "x, y, l, h",
        [
            _shift("x", "$2", shift - 1),
            # A byte that is not zero has 0x80 set afterwards.
            "and.b32 y, $3, $4;",
            "add.u32 y, y, 0x7f7f7f7f;",
            "shr.b32 y, y, 7;",
            f"lop3.b32 x, y, x, 0x01010101, {_CHOOSE:#x};",
            "and.b32 x, x, 0x07070707;",
            "shr.b32 y, x, 4;",
            "or.b32 x, x, y;",
            "prmt.b32 x, x, 0, 0x4420;",
            f"prmt.b32 l, {low}, {low_2}, x;",
            f"prmt.b32 h, {high}, {high_2}, x;",
            "prmt.b32 $0, l, h, 0x5140;",
            "prmt.b32 $1, l, h, 0x7362;",
        ],
    )


def _four_bits() -> str:
    """$0, $1 (low nibbles) and $2, $3 (high ones) from $4.

    m and n are 0xff where a nibble's highest bit is set. A magnitude's index is the nibble's lower
    bits, counted downwards where that bit is not set.
    """
    low, low_2, high, high_2 = _tables(5)
    lines = [
        "shl.b32 m, $4, 4;",
        "prmt.b32 m, m, 0, 0xba98;",
        "prmt.b32 n, $4, 0, 0xba98;",
        f"lop3.b32 t, m, n, 0x0f0f0f0f, {_CHOOSE:#x};",
        f"lop3.b32 x, $4, t, 0x77777777, {_FOLD:#x};",
        "shr.b32 y, x, 16;",
    ]
    # Nibbles are selectors as they lie: low and high one of two bytes, then of the other two.
    for source, signs, first, second in (("x", "0x5140", "$0", "$2"), ("y", "0x7362", "$1", "$3")):
        lines += [
            f"prmt.b32 l, {low}, {low_2}, {source};",
            f"prmt.b32 h, {high}, {high_2}, {source};",
            f"prmt.b32 t, m, n, {signs};",
            f"lop3.b32 h, h, t, 0x80808080, {_SIGN:#x};",
            f"prmt.b32 {first}, l, h, 0x6240;",
            f"prmt.b32 {second}, l, h, 0x7351;",
        ]
    return _block("m, n, t, x, y, l, h", lines)


def lookup_ptx(symbol_bits: int, slice_number: int) -> str:
    """The PTX of one slice; at four bits that of both."""
    if symbol_bits == 4:
        return _four_bits()
    if symbol_bits == 3:
        return _three_bits(2 * slice_number)
    return _few_levels(symbol_bits, symbol_bits * slice_number)


def _constraints(outputs: int, inputs: int) -> str:
    return ",".join(["=r"] * outputs + ["r"] * (inputs + 16))


PTX_1 = tl.constexpr(tuple(lookup_ptx(1, number) for number in range(8)))
PTX_2 = tl.constexpr(tuple(lookup_ptx(2, number) for number in range(4)))
PTX_3 = tl.constexpr(tuple(lookup_ptx(3, number) for number in range(4)))
PTX_4 = tl.constexpr(lookup_ptx(4, 0))
FROM_BYTE = tl.constexpr(_constraints(2, 1))
FROM_BYTE_AND_BIT = tl.constexpr(_constraints(2, 3))
FROM_NIBBLES = tl.constexpr(_constraints(4, 1))


@triton.jit
def table_registers(book, SYMBOL_BITS: tl.constexpr):
    """Bytes of at most eight levels, of magnitudes at four bits: low 0-3, 4-7, high 0-3, 4-7."""
    FIRST: tl.constexpr = 8 if SYMBOL_BITS == 4 else 0
    number = tl.arange(0, 8)
    inside = number < (8 if SYMBOL_BITS == 4 else 1 << SYMBOL_BITS)
    level = tl.load(book + FIRST + number, mask=inside, other=0.0)
    word = level.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.int32)
    place = number % 4 * 8
    low, high = (word & 255) << place, (word >> 8) << place
    first = number < 4
    return (
        tl.sum(tl.where(first, low, 0)),
        tl.sum(tl.where(first, 0, low)),
        tl.sum(tl.where(first, high, 0)),
        tl.sum(tl.where(first, 0, high)),
    )


@triton.jit
def _later_plane(
    page,
    tokens,
    column,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    SLICE: tl.constexpr,
    FIRST_BYTES: tl.constexpr,
    SYMBOLS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Bytes of another plane at the symbols of a slice, and how far up in them those are."""
    BYTES: tl.constexpr = (SYMBOLS * WIDTH + 31) // 32 * 4
    symbol = SLICE * FIRST_BYTES + column
    offset = byte_offset(tokens, symbol % BYTES, BYTES, KEYS)
    return tl.load(page + (64 * START + offset)), (symbol // BYTES * WIDTH) & 7


@triton.jit
def _symbol_levels(
    page,
    book,
    tables,
    tokens,
    columns,
    SYMBOL_BITS: tl.constexpr,
    DIM: tl.constexpr,
    PAIRED: tl.constexpr,
    KEYS: tl.constexpr,
    PERMUTE: tl.constexpr,
):
    """`level_tiles` of a codebook."""
    WIDTH: tl.constexpr = first_plane(SYMBOL_BITS)
    SYMBOLS: tl.constexpr = (DIM + 1) // 2 if PAIRED else DIM
    BYTES: tl.constexpr = (SYMBOLS * WIDTH + 31) // 32 * 4
    # Where a last plane of one bit starts.
    LAST: tl.constexpr = BYTES + ((SYMBOLS * 2 + 31) // 32 * 4 if SYMBOL_BITS == 7 else 0)
    column = columns % BYTES
    byte = tl.load(page + byte_offset(tokens, column, BYTES, KEYS))
    found = ()
    if PERMUTE and SYMBOL_BITS == 4 and not PAIRED:
        found = tl.inline_asm_elementwise(
            PTX_4,
            FROM_NIBBLES,
            [byte, tables[0], tables[1], tables[2], tables[3]],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    else:
        for number in tl.static_range(8 // WIDTH):
            if PERMUTE and SYMBOL_BITS <= 2:
                levels = tl.inline_asm_elementwise(
                    PTX_1[number] if SYMBOL_BITS == 1 else PTX_2[number],
                    FROM_BYTE,
                    [byte, tables[0], tables[1], tables[2], tables[3]],
                    dtype=tl.float16,
                    is_pure=True,
                    pack=4,
                )
                found = found + (levels,)
            elif PERMUTE and SYMBOL_BITS == 3:
                last, place = _later_plane(
                    page, tokens, column, BYTES, 1, number, BYTES, SYMBOLS, KEYS
                )
                levels = tl.inline_asm_elementwise(
                    PTX_3[number],
                    FROM_BYTE_AND_BIT,
                    [
                        byte,
                        last,
                        (1 << place).to(tl.uint8),
                        tables[0],
                        tables[1],
                        tables[2],
                        tables[3],
                    ],
                    dtype=tl.float16,
                    is_pure=True,
                    pack=4,
                )
                found = found + (levels,)
            else:
                symbol = (byte >> (number * WIDTH)).to(tl.int32) & ((1 << WIDTH) - 1)
                if SYMBOL_BITS == 6 or SYMBOL_BITS == 7:
                    more, place = _later_plane(
                        page, tokens, column, BYTES, 2, number, BYTES, SYMBOLS, KEYS
                    )
                    symbol = symbol << 2 | (more.to(tl.int32) >> place) & 3
                if SYMBOL_BITS == 3 or SYMBOL_BITS == 5 or SYMBOL_BITS == 7:
                    more, place = _later_plane(
                        page, tokens, column, LAST, 1, number, BYTES, SYMBOLS, KEYS
                    )
                    symbol = symbol << 1 | (more.to(tl.int32) >> place) & 1
                if PAIRED:
                    found = found + (
                        tl.load(book + 2 * symbol).to(tl.float16),
                        tl.load(book + 2 * symbol + 1).to(tl.float16),
                    )
                else:
                    found = found + (tl.load(book + symbol).to(tl.float16),)
    return found


@triton.jit
def level_tiles(
    page,
    book,
    tables,
    tokens,
    columns,
    SYMBOL_BITS: tl.constexpr,
    DIM: tl.constexpr,
    PAIRED: tl.constexpr,
    HALF_BITS: tl.constexpr,
    KEYS: tl.constexpr,
    PERMUTE: tl.constexpr,
):
    """Float16 levels of every slice of a page's bytes `columns`, a tuple of tiles.

    Slice h of column k is symbol h·B + k, B being the bytes of a row's first plane; where symbols
    stand for pairs each slice is two tiles, of the first and of the second coordinate. Columns at B
    and beyond are padding. Of a trellis, of HALF_BITS half bits a coordinate, see `path_levels`.
    """
    if HALF_BITS:
        found = path_levels(page, book, tokens, columns, HALF_BITS, DIM, KEYS)
    else:
        found = _symbol_levels(
            page, book, tables, tokens, columns, SYMBOL_BITS, DIM, PAIRED, KEYS, PERMUTE
        )
    return found


@triton.jit
def tile_coordinates(
    columns,
    PART: tl.constexpr,
    SYMBOL_BITS: tl.constexpr,
    DIM: tl.constexpr,
    PAIRED: tl.constexpr,
    HALF_BITS: tl.constexpr,
):
    """The coordinate in each column of tile PART of `level_tiles`; DIM or more in padding."""
    if HALF_BITS:
        return columns * WINDOWS + PART
    WIDTH: tl.constexpr = first_plane(SYMBOL_BITS)
    SYMBOLS: tl.constexpr = (DIM + 1) // 2 if PAIRED else DIM
    BYTES: tl.constexpr = (SYMBOLS * WIDTH + 31) // 32 * 4
    AXES: tl.constexpr = 2 if PAIRED else 1
    symbol = PART // AXES * BYTES + columns
    coordinate = symbol + PART % AXES * SYMBOLS
    return tl.where((columns < BYTES) & (symbol < SYMBOLS) & (coordinate < DIM), coordinate, DIM)
