"""Viterbi's search of paths, by the rules of kernels/trellis/README.md.

A lane is a vector: all states of a step are its registers, and nothing crosses lanes.
"""

import triton
import triton.language as tl

from sixfold.kernels._triton.pages import byte_offset
from sixfold.kernels._triton.paths import place_of

_STATES = tl.constexpr(128)
# Bits of a squared difference below those of a cost, and what rounds there.
_SHIFT = tl.constexpr(15)
_HALF = tl.constexpr(1 << 14)
_LEAST_DIFFERENCE = tl.constexpr(-(1 << 15))
_LARGEST_DIFFERENCE = tl.constexpr((1 << 15) - 1)
# Adding and subtracting it rounds to whole numbers, ties to even.
_ROUND_32 = tl.constexpr(1.5 * 2**23)
_ROUND_64 = tl.constexpr(1.5 * 2**52)


@triton.constexpr_function
def advance(coordinate, half_bits):
    """Bits that leave the window behind a coordinate, which may be given by its parity."""
    parity = coordinate % 2
    return place_of(parity + 1, half_bits) - place_of(parity, half_bits)


@triton.constexpr_function
def kept_rows(half_bits):
    """Most sums that are kept from one step to the next."""
    return _STATES.value >> half_bits // 2


@triton.jit
def grid_words(book, UNIT: tl.constexpr, LARGEST: tl.constexpr):
    """Codewords as whole numbers [128], int32."""
    level = tl.load(book + tl.arange(0, _STATES)).to(tl.float64) * UNIT
    whole = (level + _ROUND_64) - _ROUND_64
    return tl.minimum(tl.maximum(whole, -LARGEST), LARGEST).to(tl.int32)


@triton.jit
def grid_places(u, words, UNIT: tl.constexpr, INTERVALS: tl.constexpr, LARGEST: tl.constexpr):
    """Coordinates at the middles of their intervals, int32."""
    half = (tl.max(tl.abs(words), 0) + (UNIT // 4 + INTERVALS - 1)) // INTERVALS
    half = tl.minimum(half, LARGEST // INTERVALS)
    rate = tl.full([1], UNIT, tl.float64) / (2 * half).to(tl.float64)
    number = u * rate.to(tl.float32)[:, None] - 0.5
    number = tl.minimum(tl.maximum(number, -(INTERVALS // 2)), INTERVALS // 2 - 1)
    number = (number + _ROUND_32) - _ROUND_32
    return (2 * number.to(tl.int32) + 1) * half


@triton.jit
def _cost(place, word, WIDE: tl.constexpr):
    """The squared difference, rounded; not yet stopped at the most that sums hold."""
    difference = place - word
    if WIDE:
        difference = tl.minimum(tl.maximum(difference, _LEAST_DIFFERENCE), _LARGEST_DIFFERENCE)
    return (difference * difference + _HALF) >> _SHIFT


@triton.jit
def _step(
    kept,
    place,
    word,
    history,
    BEFORE: tl.constexpr,
    ADVANCE: tl.constexpr,
    MOST: tl.constexpr,
    N: tl.constexpr,
):
    """The least costs of all paths, one coordinate on; those before go to `history`.

    kept[b, n]: of all paths of vector n whose window holds the bits b once the lowest have left.
    """
    row = tl.arange(0, _STATES >> BEFORE)[:, None]
    tl.store(history + (row * N + tl.arange(0, N)[None, :]), kept.to(history.dtype.element_ty))
    sums = _cost(place[None, :], word, MOST > 255)
    # The bits that enter are the highest: every value of them goes on from the same `kept`.
    sums = tl.reshape(sums, [1 << BEFORE, _STATES >> BEFORE, N]) + kept[None]
    sums = tl.reshape(sums, [_STATES >> ADVANCE, 1 << ADVANCE, N])
    return tl.minimum(tl.min(sums, 1), MOST)


@triton.jit
def _forward(
    kept,
    places,
    words,
    history,
    first,
    PAIRS: tl.constexpr,
    PARITY: tl.constexpr,
    DIM: tl.constexpr,
    HALF_BITS: tl.constexpr,
    MOST: tl.constexpr,
    N: tl.constexpr,
):
    """Sums kept after 2·PAIRS steps from coordinate `first` on, modulo DIM."""
    word = tl.load(words + tl.arange(0, _STATES)).to(tl.int32)[:, None]
    for pair in range(PAIRS):
        for half in tl.static_range(2):
            step = 2 * pair + half
            kept = _step(
                kept,
                tl.load(places + (first + step) % DIM * 64).to(tl.int32),
                word,
                history + step * (kept_rows(HALF_BITS) * N),
                advance(PARITY + half + 1, HALF_BITS),
                advance(PARITY + half, HALF_BITS),
                MOST,
                N,
            )
        kept -= tl.min(kept, 0)[None, :]
    return kept


@triton.jit
def _state(
    left,
    step,
    place,
    words,
    history,
    PARITY: tl.constexpr,
    HALF_BITS: tl.constexpr,
    MOST: tl.constexpr,
    N: tl.constexpr,
):
    """The best state in a step behind which the bits `left` are left, and those left before.

    Of equals the lowest. The few sums it needs are computed again, as the reference does.
    """
    BEFORE: tl.constexpr = advance(PARITY + 1, HALF_BITS)
    ADVANCE: tl.constexpr = advance(PARITY, HALF_BITS)
    ending = tl.arange(0, 1 << ADVANCE)[:, None]
    choice = (left << ADVANCE)[None, :] | ending
    origin = step * kept_rows(HALF_BITS) + (choice & ((_STATES >> BEFORE) - 1))
    before = tl.load(history + (origin * N + tl.arange(0, N)[None, :])).to(tl.int32) & MOST
    word = tl.load(words + choice).to(tl.int32)
    sums = tl.minimum(before + _cost(place[None, :], word, MOST > 255), MOST)
    best = tl.min((sums << ADVANCE) | ending, 0) & ((1 << ADVANCE) - 1)
    state = (left << ADVANCE) | best
    return state, state & ((_STATES >> BEFORE) - 1)


@triton.jit
def _seam(
    places,
    words,
    history,
    MARGIN: tl.constexpr,
    DIM: tl.constexpr,
    HALF_BITS: tl.constexpr,
    MOST: tl.constexpr,
    N: tl.constexpr,
):
    """What the best free path around the seam has there: the bits that begin and end the path."""
    FIRST: tl.constexpr = (MARGIN // DIM + 1) * DIM - MARGIN
    ROWS: tl.constexpr = _STATES >> advance(FIRST + 1, HALF_BITS)
    kept = tl.zeros([ROWS, N], tl.int32)
    kept = _forward(kept, places, words, history, FIRST, MARGIN, FIRST % 2, DIM, HALF_BITS, MOST, N)
    # What lanes of a block wrote others may read.
    tl.debug_barrier()
    left = tl.min(kept * _STATES + tl.arange(0, ROWS)[:, None], 0) & (_STATES - 1)
    seam = tl.zeros([N], tl.int32)
    for pair in range(MARGIN - MARGIN // 2):
        for half in tl.static_range(2):
            step = 2 * (MARGIN - 1 - pair) + 1 - half
            place = tl.load(places + (FIRST + step) % DIM * 64).to(tl.int32)
            state, left = _state(
                left, step, place, words, history, FIRST + 1 - half, HALF_BITS, MOST, N
            )
            seam = tl.where(step == MARGIN, state, seam)
    tl.debug_barrier()
    return seam & ((_STATES >> advance(1, HALF_BITS)) - 1)


@triton.jit(do_not_specialize=["first"])
def search_kernel(
    places,
    words,
    history,
    pages,
    slots,
    first,
    page_slot,
    page_head,
    heads,
    DIM: tl.constexpr,
    HALF_BITS: tl.constexpr,
    MARGIN: tl.constexpr,
    STEPS: tl.constexpr,
    MOST: tl.constexpr,
    KEYS: tl.constexpr,
    N: tl.constexpr,
):
    """Paths of N tokens of one head of a page, written to it.

    Args:
        places: int16 [pages, heads, DIM, 64], see `grid_places`.
        words: int16 [128], see `grid_words`.
        history: [programs, heads, STEPS, kept_rows, N] of 8 or 16 bits, as MOST needs.
        pages: uint8, strides by slot and head.
        slots: Of all pages.
        first: The first page of these programs.
        page_slot: Stride of slots.
        page_head: Stride of heads.
        heads: Heads of a page.
    """
    USED: tl.constexpr = DIM * HALF_BITS // 16
    BYTES: tl.constexpr = (USED + 3) // 4 * 4
    LAST: tl.constexpr = advance(1, HALF_BITS)
    parts: tl.constexpr = 64 // N
    program, head = tl.program_id(0), tl.program_id(1)
    token = program % parts * N + tl.arange(0, N)
    number = (program // parts * heads + head).to(tl.int64)
    places += number * (DIM * 64) + token
    number = (program * heads + head).to(tl.int64)
    history += number * (STEPS * kept_rows(HALF_BITS) * N)
    slot = tl.load(slots + first + program // parts)
    pages += slot * page_slot + head * page_head

    seam = _seam(places, words, history, MARGIN, DIM, HALF_BITS, MOST, N)
    ends = tl.arange(0, _STATES >> LAST)[:, None] == seam[None, :]
    kept = tl.where(ends, 0, MOST)
    _forward(kept, places, words, history, 0, DIM // 2, 0, DIM, HALF_BITS, MOST, N)
    tl.debug_barrier()
    left = seam
    # Bits of the path from the step on, sixteen of them.
    bits = tl.zeros([N], tl.int32)
    for pair in range(DIM // 2):
        for half in tl.static_range(2):
            step = DIM - 1 - 2 * pair - half
            place = tl.load(places + step * 64).to(tl.int32)
            state, left = _state(left, step, place, words, history, 1 - half, HALF_BITS, MOST, N)
            leaves = advance(1 - half, HALF_BITS)
            bits = ((bits << leaves) | (state & ((1 << leaves) - 1))) & 0xFFFF
            start, end = step * HALF_BITS // 2, (step + 1) * HALF_BITS // 2
            byte = (start + 7) // 8
            # Whether this step completed it.
            if byte < (end + 7) // 8:
                whole = ((bits >> (8 * byte - start)) & 255).to(tl.uint8)
                tl.store(pages + byte_offset(token, byte, BYTES, KEYS), whole)
    for byte in tl.static_range(USED, BYTES):
        tl.store(pages + byte_offset(token, byte, BYTES, KEYS), tl.zeros([N], tl.uint8))
