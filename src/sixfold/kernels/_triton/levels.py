"""Codebook lookup without memory: four codes at a time by byte permutes.

A codebook of up to four bits is antisymmetric, so a symbol is a sign (its highest bit) and one of
at most eight magnitudes. Eight float16 magnitudes are sixteen bytes: their high bytes fill two
registers and their low bytes two more, which is what `prmt` selects four bytes from at once. Inline
PTX takes a register of four bytes of a page and gives four float16 levels in two registers:

    x      the bytes, shifted so that each one's symbol is lowest (two planes: put together)
    m      0xff where the symbol's highest bit is set
    s      (x ^ ~m) & mask: the magnitude, which counts downwards where the sign is negative
    t      s | s >> 4, whose bytes 0 and 2 are four selectors in a row
    h, l   high and low bytes of the four magnitudes; the sign goes into h
    0, 1   high and low bytes interleaved

Twelve instructions for four codes (fifteen at three bits). Triton's interpreter runs no PTX:
`pages.gathered_levels` is the twin, and the tests run the instructions below in Python.
"""

import triton
import triton.language as tl

# lop3 tables: a = 0xf0, b = 0xcc, c = 0xaa.
_FOLD = (0xF0 ^ (~0xCC & 0xFF)) & 0xAA  # (a ^ ~b) & c
_SIGN = 0xF0 ^ ((~0xCC & 0xFF) & 0xAA)  # a ^ (~b & c)
_CHOOSE = (0xF0 & 0xAA) | (0xCC & ~0xAA & 0xFF)  # a where c, b elsewhere


def lookup_ptx(symbol_bits: int) -> str:
    """PTX from registers $2... (see `_arguments`) to the levels in $0 and $1."""
    two_planes = symbol_bits == 3
    tables = 6 if two_planes else 4
    # Four elements of an int32 argument are four registers of the same number.
    h0, h1, l0, l1 = (f"${tables + 4 * i}" for i in range(4))
    lines = ["{", ".reg .b32 x, y, m, s, t, h, l;", "shr.b32 x, $2, w;"]
    shift = ["and.b32 w, $3, 7;"]
    if two_planes:
        shift.append("and.b32 v, $5, 7;")
        lines += [
            "shl.b32 x, x, 1;",
            "shr.b32 y, $4, v;",
            f"lop3.b32 x, y, x, 0x01010101, {_CHOOSE:#x};",
        ]
    lines[2:2] = [".reg .b32 w, v;", *shift]
    magnitudes = 0x01010101 * ((1 << symbol_bits - 1) - 1)
    lines += [
        f"shl.b32 m, x, {8 - symbol_bits};",
        "prmt.b32 m, m, 0, 0xba98;",
        f"lop3.b32 s, x, m, {magnitudes:#x}, {_FOLD:#x};",
        "shr.b32 t, s, 4;",
        "or.b32 t, t, s;",
        "prmt.b32 t, t, 0, 0x4420;",
        f"prmt.b32 h, {h0}, {h1}, t;",
        f"prmt.b32 l, {l0}, {l1}, t;",
        f"lop3.b32 h, h, m, 0x80808080, {_SIGN:#x};",
        "prmt.b32 $0, l, h, 0x5140;",
        "prmt.b32 $1, l, h, 0x7362;",
        "}",
    ]
    return "\n".join(lines)


def _constraints(symbol_bits: int) -> str:
    inputs = (4 if symbol_bits == 3 else 2) + 4 * 4
    return ",".join(["=r"] * 2 + ["r"] * inputs)


PTX_1 = tl.constexpr(lookup_ptx(1))
PTX_2 = tl.constexpr(lookup_ptx(2))
PTX_3 = tl.constexpr(lookup_ptx(3))
PTX_4 = tl.constexpr(lookup_ptx(4))
ONE_PLANE = tl.constexpr(_constraints(4))
TWO_PLANES = tl.constexpr(_constraints(3))


@triton.jit
def magnitude_bytes(book, SYMBOL_BITS: tl.constexpr):
    """The registers of a codebook of up to four bits: high bytes 0-3, 4-7, low bytes 0-3, 4-7."""
    HALF: tl.constexpr = 1 << (SYMBOL_BITS - 1)
    number = tl.arange(0, 8)
    level = tl.load(book + HALF + number, mask=number < HALF, other=0.0)
    word = level.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.int32)
    place = number % 4 * 8
    low, high = (word & 255) << place, (word >> 8) << place
    first = number < 4
    return (
        tl.sum(tl.where(first, high, 0)),
        tl.sum(tl.where(first, 0, high)),
        tl.sum(tl.where(first, low, 0)),
        tl.sum(tl.where(first, 0, low)),
    )


@triton.jit
def permuted_levels(byte, shift, tables, SYMBOL_BITS: tl.constexpr):
    """Float16 levels of one plane of bytes (1, 2 or 4 bits).

    Shifts must agree within a register: they do along the four coordinates or tokens of a word.
    """
    if SYMBOL_BITS == 1:
        PTX: tl.constexpr = PTX_1
    elif SYMBOL_BITS == 2:
        PTX: tl.constexpr = PTX_2
    else:
        PTX: tl.constexpr = PTX_4
    return tl.inline_asm_elementwise(
        PTX,
        ONE_PLANE,
        [byte, shift, tables[0], tables[1], tables[2], tables[3]],
        dtype=tl.float16,
        is_pure=True,
        pack=4,
    )


@triton.jit
def permuted_levels_3(byte, shift, last_byte, last_shift, tables):
    """Float16 levels of three-bit symbols: a plane of two bits and one of one."""
    return tl.inline_asm_elementwise(
        PTX_3,
        TWO_PLANES,
        [byte, shift, last_byte, last_shift, tables[0], tables[1], tables[2], tables[3]],
        dtype=tl.float16,
        is_pure=True,
        pack=4,
    )
