"""Rotation of a tile of vectors in registers, in the order of kernels/rotate/README.md.

Tiles are [N, SIZE] float32. With dim = m·2^k, SIZE = 2^k blocks of m coordinates, each padded to a
power of two with zeros; without butterflies (k = 0) the block is split in two halves that are
padded, so that the planes of a turn are columns SIZE / 2 apart in every case. `launch.rotation`
makes the constants:

    DIM, ROUNDS, ORDER   of the rotation; ROUNDS = 0 is a dense factor
    SIZE                 columns of a tile
    INNER, WIDTH         coordinates and columns of a padded run
    BLOCK                columns of what the factor multiplies
"""

import triton
import triton.language as tl


@triton.jit
def coordinates(SIZE: tl.constexpr, INNER: tl.constexpr, WIDTH: tl.constexpr):
    """The coordinate in each column [SIZE]; in the padding, which `inside` tells, any other.

    Runs of it are contiguous to the compiler, so that loads are wide.
    """
    column = tl.arange(0, SIZE)
    return column // WIDTH * INNER + column % WIDTH


@triton.jit
def inside(DIM: tl.constexpr, SIZE: tl.constexpr, INNER: tl.constexpr, WIDTH: tl.constexpr):
    """Which columns [SIZE] hold a coordinate."""
    column = tl.arange(0, SIZE)
    return (column % WIDTH < INNER) & (column < (DIM + INNER - 1) // INNER * WIDTH)


@triton.jit
def in_order(x, DIM: tl.constexpr, INNER: tl.constexpr, WIDTH: tl.constexpr):
    """The tile with coordinate i in column i, padding at the end: what sums are folded over."""
    if INNER == WIDTH or DIM <= WIDTH:
        return x
    coordinate = tl.arange(0, x.shape[1])
    column = coordinate // INNER * WIDTH + coordinate % INNER
    # Behind the last coordinate comes a column that is zero.
    column = tl.where(coordinate < DIM, column, INNER)[None, :]
    return tl.gather(x, tl.broadcast_to(column, [x.shape[0], x.shape[1]]), 1)


@triton.jit
def _across(x, STRIDE: tl.constexpr):
    """Every value's partner STRIDE columns away: a warp shuffle, or nothing, but no memory."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.reshape(bits, [x.shape[0] * x.shape[1] // (2 * STRIDE), 2, STRIDE])
    # Exact for integers: (a + b) - a = b, which the compiler sees too.
    partner = tl.sum(bits, 1, keep_dims=True) - bits
    return tl.reshape(partner, [x.shape[0], x.shape[1]]).to(tl.float32, bitcast=True)


@triton.jit
def _turn(
    x,
    turns,
    DIM: tl.constexpr,
    SIZE: tl.constexpr,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """Rotate the planes of coordinates i and i + DIM / 2; `turns` points to a round's cosines."""
    mask, high = inside(DIM, SIZE, INNER, WIDTH), tl.arange(0, SIZE) >= SIZE // 2
    plane = coordinates(SIZE, INNER, WIDTH) - tl.where(high, DIM // 2, 0)
    cosine = tl.load(turns + plane, mask=mask, other=0.0)
    sine = tl.load(turns + DIM // 2 + plane, mask=mask, other=0.0)
    sine = tl.where(high != INVERSE, sine, -sine)
    return cosine[None, :] * x + sine[None, :] * _across(x, SIZE // 2)


@triton.jit
def _walsh_hadamard(x, BLOCK: tl.constexpr):
    """Butterflies over whole blocks, smallest stride first."""
    column = tl.arange(0, x.shape[1])
    for stage in tl.static_range(16):
        if (BLOCK << stage) < x.shape[1]:
            sign = tl.where((column & (BLOCK << stage)) == 0, 1.0, -1.0)
            x = _across(x, BLOCK << stage) + sign[None, :] * x
    return x


@triton.jit
def _product(bits, position, factor, row, column, ORDER, INNER, WIDTH, TRANSPOSED, TYPE):
    """Column `column` of the factor times that coordinate of every block [blocks, BLOCK]."""
    here = position == column // INNER * WIDTH + column % INNER
    value = tl.sum(tl.where(here[None, :], bits, 0), 1, keep_dims=True)
    value = value.to(tl.float32, bitcast=True)
    offset = column * ORDER + row if TRANSPOSED else row * ORDER + column
    entries = tl.load(factor + offset, mask=row < ORDER, other=0.0)
    return entries[None, :].to(TYPE) * value.to(TYPE)


@triton.jit
def _multiply(
    x,
    factor,
    ORDER: tl.constexpr,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TYPE: tl.constexpr,
):
    """The factor times every block, in ascending order of columns; summed in `TYPE`."""
    bits = tl.reshape(x.to(tl.int32, bitcast=True), [x.shape[0] * x.shape[1] // BLOCK, BLOCK])
    position = tl.arange(0, BLOCK)
    row = position // WIDTH * INNER + position % WIDTH
    row = tl.where(position % WIDTH < INNER, row, ORDER)
    total = _product(bits, position, factor, row, 0, ORDER, INNER, WIDTH, TRANSPOSED, TYPE)
    for column in range(1, ORDER):
        total += _product(
            bits, position, factor, row, column, ORDER, INNER, WIDTH, TRANSPOSED, TYPE
        )
    return tl.reshape(total.to(tl.float32), [x.shape[0], x.shape[1]])


@triton.jit
def unnormalized(
    x,
    turns,
    factor,
    DIM: tl.constexpr,
    ROUNDS: tl.constexpr,
    ORDER: tl.constexpr,
    SIZE: tl.constexpr,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """The rotated tile, DIM^(ROUNDS / 2) times as long."""
    if ROUNDS == 0:
        # Rounded once, so that the order of additions hardly ever shows.
        x = _multiply(x, factor, ORDER, INNER, WIDTH, BLOCK, INVERSE, tl.float64)
    for step in tl.static_range(ROUNDS):
        if INVERSE:
            x = _walsh_hadamard(x, BLOCK)
            if ORDER > 1:
                x = _multiply(x, factor, ORDER, INNER, WIDTH, BLOCK, True, tl.float32)
            x = _turn(x, turns + (ROUNDS - 1 - step) * DIM, DIM, SIZE, INNER, WIDTH, True)
        else:
            x = _turn(x, turns + step * DIM, DIM, SIZE, INNER, WIDTH, False)
            if ORDER > 1:
                x = _multiply(x, factor, ORDER, INNER, WIDTH, BLOCK, False, tl.float32)
            x = _walsh_hadamard(x, BLOCK)
    return x
