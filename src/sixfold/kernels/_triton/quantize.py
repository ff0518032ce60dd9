"""Vectors to symbols and scales, a tile in registers, by the rules of kernels/encode/README.md."""

import triton
import triton.language as tl

from sixfold.kernels._triton.rotate import in_order, unnormalized

# Up to here a symbol is counted boundary by boundary; wider ones are searched for in memory.
_COUNTED_BITS = tl.constexpr(4)
_INFINITY = tl.constexpr(0x7F800000)
_FLOAT16_NAN = tl.constexpr(0x7E00)


@triton.jit
def fold_sum(x):
    """Sum of every row of [N, columns]: the upper half is added to the lower until one is left."""
    for _ in tl.static_range(16):
        if x.shape[1] > 1:
            x = tl.sum(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), 1)
    return tl.reshape(x, [x.shape[0]])


@triton.jit
def moderate(x):
    """Vectors times a power of two, by which no square over- or underflows.

    Returns:
        The tile, with zeros for vectors that are not finite; the powers [N]; whether a vector is
        finite [N]; whether it is finite and not zero [N].
    """
    peak = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    finite = peak < _INFINITY
    exponent = tl.maximum(254 - (peak >> 23), 1)
    power = (exponent << 23).to(tl.float32, bitcast=True)
    return tl.where(finite[:, None], x, 0.0) * power[:, None], power, finite, finite & (peak > 0)


@triton.jit
def _boundary(centroids, index):
    return (tl.load(centroids + index + 1) + tl.load(centroids + index)) * 0.5


@triton.jit
def _descend(u, centroids, symbol, HALF: tl.constexpr):
    """A step of bisection: `HALF` boundaries more are below u, or not."""
    return symbol + tl.where(u > _boundary(centroids, symbol + (HALF - 1)), HALF, 0)


@triton.jit
def nearest(u, centroids, SYMBOL: tl.constexpr):
    """Number of boundaries strictly below each coordinate, and the codewords."""
    symbol = tl.zeros(u.shape, tl.int32)
    if SYMBOL <= _COUNTED_BITS:
        for index in tl.static_range((1 << SYMBOL) - 1):
            symbol += (u > _boundary(centroids, index)).to(tl.int32)
    else:
        for step in tl.static_range(SYMBOL):
            symbol = _descend(u, centroids, symbol, 1 << (SYMBOL - 1 - step))
    return symbol, tl.load(centroids + symbol)


@triton.jit
def halves(u, DIM: tl.constexpr):
    """Coordinates i and i + ceil(DIM / 2) of a tile in order, zero-padded: two tiles."""
    half: tl.constexpr = (DIM + 1) // 2
    if 2 * half == u.shape[1]:
        # A sum of one number and a zero, in place of a split, which would copy to every thread.
        bits = tl.reshape(u.to(tl.int32, bitcast=True), [u.shape[0], 2, half])
        is_first = (tl.arange(0, 2) == 0)[None, :, None]
        first = tl.sum(tl.where(is_first, bits, 0), 1).to(tl.float32, bitcast=True)
        return first, tl.sum(tl.where(is_first, 0, bits), 1).to(tl.float32, bitcast=True)
    else:
        # Padding takes a column that is zero, or any where it is masked below.
        index = tl.arange(0, u.shape[1] // 2)
        shape: tl.constexpr = [u.shape[0], u.shape[1] // 2]
        first = tl.gather(u, tl.broadcast_to(index[None, :], shape), 1)
        second = tl.minimum(index + half, u.shape[1] - 1)
        second = tl.gather(u, tl.broadcast_to(second[None, :], shape), 1)
        first = tl.where((index < half)[None, :], first, 0.0)
        return first, tl.where((index + half < DIM)[None, :], second, 0.0)


@triton.jit
def together(first, second, DIM: tl.constexpr):
    """Inverse of `halves`."""
    columns: tl.constexpr = 2 * first.shape[1]
    is_first = (tl.arange(0, 2) == 0)[None, :, None]
    both = tl.where(is_first, first[:, None, :], second[:, None, :])
    both = tl.reshape(both, [first.shape[0], columns])
    if (DIM + 1) // 2 == first.shape[1]:
        return both
    else:
        half: tl.constexpr = (DIM + 1) // 2
        coordinate = tl.arange(0, columns)
        column = coordinate // half * first.shape[1] + coordinate % half
        column = tl.where(coordinate < DIM, column, columns - 1)[None, :]
        return tl.gather(both, tl.broadcast_to(column, [first.shape[0], columns]), 1)


@triton.jit
def nearest_pairs(x, y, points, SYMBOL: tl.constexpr):
    """The first of the nearest of the mirrored points of each pair, and its coordinates."""
    # As `pair_grids.PAIR_MIRRORS` has it.
    MIRRORS: tl.constexpr = 1 if SYMBOL == 5 else 2
    sign = (x < 0).to(tl.int32) << (SYMBOL - 1)
    x = tl.abs(x)
    if MIRRORS == 2:
        sign |= (y < 0).to(tl.int32) << (SYMBOL - 2)
        y = tl.abs(y)
    best = tl.full(x.shape, float("inf"), tl.float32)
    symbol = tl.zeros(x.shape, tl.int32)
    for number in tl.static_range(1 << (SYMBOL - MIRRORS)):
        dx, dy = x - tl.load(points + 2 * number), y - tl.load(points + 2 * number + 1)
        distance = dx * dx + dy * dy
        closer = distance < best
        best = tl.where(closer, distance, best)
        symbol = tl.where(closer, number, symbol)
    symbol |= sign
    return symbol, tl.load(points + 2 * symbol), tl.load(points + 2 * symbol + 1)


@triton.jit
def _stored(scale, finite):
    """`packing.encode_scale` of float64 scales, as float16."""
    large = -tl.minimum(scale * (1.0 / 65536), 65504.0)
    single = scale.to(tl.float32)
    half = tl.where(scale > 65504.0, large, scale).to(tl.float32).to(tl.float16)
    # The canonical NaN of torch; processors' differ.
    bits = tl.where(finite, half.to(tl.int16, bitcast=True), _FLOAT16_NAN).to(tl.int32)
    upper = (single.to(tl.int32, bitcast=True) + (1 << 16)) >> 17
    small = (scale >= 2.0**-96) & (scale < 2.0**-18)
    extreme = finite & (small | (scale > 65504.0 * 65536.0))
    bits = tl.where(extreme, tl.minimum(upper, 0x37FF) - (1 << 15), bits)
    return bits.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def direction(
    x,
    turns,
    factor,
    STRETCH: tl.constexpr,
    DIM: tl.constexpr,
    ROUNDS: tl.constexpr,
    ORDER: tl.constexpr,
    SIZE: tl.constexpr,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What is quantized of a tile as `rotate` lays it out: its coordinates in order, zero-padded.

    STRETCH is DIM^(1/2 - ROUNDS / 2). Also returns what `stored_scale` needs of the vectors.
    """
    x, power, finite, valid = moderate(x)
    norm = tl.sqrt_rn(fold_sum(in_order(x * x, DIM, INNER, WIDTH)))
    divisor = tl.where(valid, norm, 1.0)
    stretch = tl.where(valid, tl.div_rn(tl.full(norm.shape, STRETCH, tl.float32), divisor), 0.0)
    u = unnormalized(x, turns, factor, DIM, ROUNDS, ORDER, SIZE, INNER, WIDTH, BLOCK, False)
    u = in_order(u * stretch[:, None], DIM, INNER, WIDTH)
    return u, norm, power, finite, valid


@triton.jit
def stored_scale(
    u,
    q,
    norm,
    power,
    finite,
    valid,
    SCALE: tl.constexpr,
    DIM: tl.constexpr,
    POSITIVE: tl.constexpr,
):
    """Float16 scales [N] of vectors with directions u and codewords q, zero behind the last.

    If POSITIVE, a negative one, of codewords that point away from the vector, becomes zero.
    """
    root = tl.full(norm.shape, DIM**-0.5, tl.float64)
    scale = norm.to(tl.float64) / power.to(tl.float64) * root
    if SCALE == "optimal":
        product = fold_sum(u * q).to(tl.float64)
        square = fold_sum(q * q).to(tl.float64)
        scale = scale * (product / tl.where(square > 0, square, 1.0))
    if SCALE == "unbiased":
        product = fold_sum(u * q).to(tl.float64)
        product = tl.where(product > 0, product, 1.0)
        scale = scale * (tl.full(norm.shape, DIM, tl.float64) / product)
    # A zero vector's scale is plus zero, whatever sign the product has.
    kept = valid & (scale > 0) if POSITIVE else valid
    return _stored(tl.where(kept, scale, 0.0), finite)


@triton.jit
def encode_tile(
    x,
    turns,
    factor,
    centroids,
    STRETCH: tl.constexpr,
    SCALE: tl.constexpr,
    SYMBOL: tl.constexpr,
    PAIRED: tl.constexpr,
    DIM: tl.constexpr,
    ROUNDS: tl.constexpr,
    ORDER: tl.constexpr,
    SIZE: tl.constexpr,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Symbols [N, columns] and float16 scales [N] of a tile as `rotate` lays it out.

    Symbols behind the last are arbitrary.
    """
    u, norm, power, finite, valid = direction(
        x, turns, factor, STRETCH, DIM, ROUNDS, ORDER, SIZE, INNER, WIDTH, BLOCK
    )
    if PAIRED:
        first, second = halves(u, DIM)
        symbol, qx, qy = nearest_pairs(first, second, centroids, SYMBOL)
        q = together(qx, qy, DIM)
    else:
        symbol, q = nearest(u, centroids, SYMBOL)
    # Padding has a codeword, too.
    q = tl.where((tl.arange(0, SIZE) < DIM)[None, :], q, 0.0)
    return symbol, stored_scale(u, q, norm, power, finite, valid, SCALE, DIM, False)
