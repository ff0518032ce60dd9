"""States of the trellis whose paths pages hold (docs/format.md, section 2b).

A state is the seven bits from a coordinate's place in the path on. Those of an even coordinate and
of the next one lie in two bytes at every width, loaded once for both. A path is cyclic: behind its
last byte comes its first.
"""

import triton
import triton.language as tl

from sixfold.kernels._triton.pages import byte_offset

# Consecutive coordinates whose bytes are loaded together. Of four more registers spill than of two.
WINDOWS = tl.constexpr(2)
STATE_BITS = tl.constexpr(7)
LAST_STATE = tl.constexpr(127)


@triton.constexpr_function
def place_of(coordinate, half_bits):
    """Where in the path a coordinate's window starts."""
    return coordinate * half_bits // 2


@triton.constexpr_function
def bytes_of(windows, half_bits):
    """Most bytes that so many windows touch, of which the first is a multiple of their number."""
    end = place_of(windows - 1, half_bits) + STATE_BITS.value
    starts = [place_of(windows * column, half_bits) % 8 for column in range(8)]
    return (max(starts) + end + 7) // 8


@triton.jit
def window_words(
    page,
    tokens,
    columns,
    WINDOWS: tl.constexpr,
    HALF_BITS: tl.constexpr,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
):
    """int32 tile of a page's bits from coordinate WINDOWS·column on, all of `WINDOWS` windows.

    Columns of padding need no mask: their bytes are found by a remainder and lie in the page.
    """
    USED: tl.constexpr = DIM * HALF_BITS // 16
    BYTES: tl.constexpr = (USED + 3) // 4 * 4
    place = columns * (WINDOWS * HALF_BITS) // 2
    words = 0
    for number in tl.static_range(bytes_of(WINDOWS, HALF_BITS)):
        byte = (place // 8 + number) % USED
        offset = byte_offset(tokens, byte, BYTES, KEYS)
        words |= tl.load(page + offset).to(tl.int32) << (8 * number)
    return words >> (place & 7)


@triton.jit
def state_of(words, NUMBER: tl.constexpr, HALF_BITS: tl.constexpr):
    """States of coordinate NUMBER of every column of `window_words`."""
    return (words >> place_of(NUMBER, HALF_BITS)) & LAST_STATE


@triton.jit
def path_levels(
    page,
    book,
    tokens,
    columns,
    HALF_BITS: tl.constexpr,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Float16 levels of coordinates WINDOWS·column + h, a tuple of a tile for every h."""
    words = window_words(page, tokens, columns, WINDOWS, HALF_BITS, DIM, KEYS)
    found = ()
    for number in tl.static_range(WINDOWS):
        found = found + (tl.load(book + state_of(words, number, HALF_BITS)).to(tl.float16),)
    return found
