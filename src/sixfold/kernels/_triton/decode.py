"""Codes to vectors: codes are read once, vectors written once."""

import triton
import triton.language as tl

from sixfold.kernels._triton.rotate import coordinates, inside, unnormalized
from sixfold.kernels._triton.unpack import codewords


@triton.jit
def decode_kernel(
    rows,
    scales,
    turns,
    factor,
    centroids,
    out,
    count,
    SHRINK: tl.constexpr,
    SYMBOL: tl.constexpr,
    PAIRED: tl.constexpr,
    N: tl.constexpr,
    DIM: tl.constexpr,
    ROUNDS: tl.constexpr,
    ORDER: tl.constexpr,
    SIZE: tl.constexpr,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """N vectors a program: packed rows and scales [count] to out [count, DIM]."""
    vector = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    mask = vector < count
    scale = tl.load(scales + vector, mask=mask, other=0.0)
    tile = codewords(
        rows, vector, mask, scale, centroids, SYMBOL, PAIRED, 0, "rows", DIM, SIZE, INNER, WIDTH
    )
    tile = unnormalized(tile, turns, factor, DIM, ROUNDS, ORDER, SIZE, INNER, WIDTH, BLOCK, True)
    offset = vector[:, None] * DIM + coordinates(SIZE, INNER, WIDTH)[None, :]
    mask = mask[:, None] & inside(DIM, SIZE, INNER, WIDTH)[None, :]
    tl.store(out + offset, tile * SHRINK, mask=mask)


@triton.jit
def decode_pages_kernel(
    pages,
    scales,
    slots,
    mean,
    channel_scale,
    turns,
    factor,
    centroids,
    out,
    n_pages,
    heads,
    page_slot,
    page_head,
    scale_slot,
    scale_head,
    HAS_MEAN: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    LAYOUT: tl.constexpr,
    ROTATED: tl.constexpr,
    SHRINK: tl.constexpr,
    SYMBOL: tl.constexpr,
    PAIRED: tl.constexpr,
    HALF_BITS: tl.constexpr,
    N: tl.constexpr,
    DIM: tl.constexpr,
    ROUNDS: tl.constexpr,
    ORDER: tl.constexpr,
    SIZE: tl.constexpr,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """N tokens of one head of a page a program; strides in elements, out [batch, heads, tokens]."""
    parts: tl.constexpr = 64 // N
    page, head = tl.program_id(0) // parts, tl.program_id(1)
    batch = page // n_pages
    token = tl.program_id(0) % parts * N + tl.arange(0, N)
    slot = tl.load(slots + page)
    scale = tl.load(scales + slot * scale_slot + head * scale_head + token)
    tile = codewords(
        pages + slot * page_slot + head * page_head,
        token,
        token < 64,
        scale,
        centroids,
        SYMBOL,
        PAIRED,
        HALF_BITS,
        LAYOUT,
        DIM,
        SIZE,
        INNER,
        WIDTH,
    )
    if not ROTATED:
        tile = unnormalized(
            tile, turns, factor, DIM, ROUNDS, ORDER, SIZE, INNER, WIDTH, BLOCK, True
        )
        tile = tile * SHRINK
    coordinate, channels = coordinates(SIZE, INNER, WIDTH), inside(DIM, SIZE, INNER, WIDTH)
    channel = (batch * heads + head) * DIM + coordinate
    if HAS_SCALE:
        divisor = tl.load(channel_scale + channel, mask=channels, other=1.0)[None, :]
        tile = tl.div_rn(tile, tl.broadcast_to(divisor, [N, SIZE]))
    if HAS_MEAN:
        tile = tile + tl.load(mean + channel, mask=channels, other=0.0)[None, :]
    row = (batch * heads + head).to(tl.int64) * n_pages * 64 + page % n_pages * 64 + token
    offset = row[:, None] * DIM + coordinate[None, :]
    if out.dtype.element_ty == tl.float16:
        # As `sixfold.kernels._narrow`: what is finite stays so.
        largest = tl.where(tl.abs(tile) == float("inf"), float("inf"), 65504.0)
        tile = tl.where(tl.abs(tile) > largest, tl.where(tile < 0, -largest, largest), tile)
    tl.store(out + offset, tile.to(out.dtype.element_ty), mask=channels[None, :])
