"""Vectors to codes in one pass: rows of a search index, or the pages of a cache."""

import triton
import triton.language as tl

from sixfold.kernels._triton.pack import store_symbols
from sixfold.kernels._triton.quantize import encode_tile
from sixfold.kernels._triton.rotate import coordinates, inside


@triton.jit
def encode_kernel(
    x,
    turns,
    factor,
    centroids,
    rows,
    scales,
    count,
    STRETCH: tl.constexpr,
    SCALE: tl.constexpr,
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
    """N vectors a program: x [count, DIM] to int32 rows [count, ROW / 4] and scales [count]."""
    vector = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    mask = vector < count
    tile = tl.load(
        x + vector[:, None] * DIM + coordinates(SIZE, INNER, WIDTH)[None, :],
        mask=mask[:, None] & inside(DIM, SIZE, INNER, WIDTH)[None, :],
        other=0.0,
    )
    symbol, scale = encode_tile(
        tile.to(tl.float32),
        turns,
        factor,
        centroids,
        STRETCH,
        SCALE,
        SYMBOL,
        PAIRED,
        DIM,
        ROUNDS,
        ORDER,
        SIZE,
        INNER,
        WIDTH,
        BLOCK,
    )
    store_symbols(rows, symbol, vector, mask, SYMBOL, PAIRED, DIM, "rows")
    tl.store(scales + vector, scale, mask=mask)


@triton.jit
def page_tile(
    x,
    x_strides,
    mean,
    channel_scale,
    page,
    head,
    token,
    n_pages,
    heads,
    HAS_MEAN: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    DIM: tl.constexpr,
    SIZE: tl.constexpr,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Vectors of one head of a page, mapped, as `rotate` lays them out.

    Pages are counted over all sequences; strides by batch, head, token and channel.
    """
    batch = page // n_pages
    coordinate, channels = coordinates(SIZE, INNER, WIDTH), inside(DIM, SIZE, INNER, WIDTH)
    start = x + batch.to(tl.int64) * x_strides[0] + head.to(tl.int64) * x_strides[1]
    position = (page % n_pages * 64 + token).to(tl.int64)
    tile = tl.load(
        start + position[:, None] * x_strides[2] + coordinate[None, :] * x_strides[3],
        mask=channels[None, :],
        other=0.0,
    ).to(tl.float32)
    channel = (batch * heads + head) * DIM + coordinate
    if HAS_MEAN:
        tile = tile - tl.load(mean + channel, mask=channels, other=0.0)[None, :]
    if HAS_SCALE:
        tile = tile * tl.load(channel_scale + channel, mask=channels, other=0.0)[None, :]
    return tile


@triton.jit
def encode_page(
    x,
    x_strides,
    mean,
    channel_scale,
    turns,
    factor,
    centroids,
    pages,
    page_strides,
    scales,
    scale_strides,
    slots,
    n_pages,
    heads,
    HAS_MEAN: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    LAYOUT: tl.constexpr,
    STRETCH: tl.constexpr,
    SCALE: tl.constexpr,
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
    """N tokens of one head of a page a program.

    Strides are in elements, of int32 for pages: by batch, head, token and channel those of x, by
    slot and head the others.
    """
    parts: tl.constexpr = 64 // N
    page, head = tl.program_id(0) // parts, tl.program_id(1)
    token = tl.program_id(0) % parts * N + tl.arange(0, N)
    tile = page_tile(
        x,
        x_strides,
        mean,
        channel_scale,
        page,
        head,
        token,
        n_pages,
        heads,
        HAS_MEAN,
        HAS_SCALE,
        DIM,
        SIZE,
        INNER,
        WIDTH,
    )
    symbol, scale = encode_tile(
        tile,
        turns,
        factor,
        centroids,
        STRETCH,
        SCALE,
        SYMBOL,
        PAIRED,
        DIM,
        ROUNDS,
        ORDER,
        SIZE,
        INNER,
        WIDTH,
        BLOCK,
    )
    slot = tl.load(slots + page)
    out = pages + slot * page_strides[0] + head * page_strides[1]
    store_symbols(out, symbol, token, token < 64, SYMBOL, PAIRED, DIM, LAYOUT)
    tl.store(scales + slot * scale_strides[0] + head * scale_strides[1] + token, scale)


@triton.jit
def encode_pages_kernel(
    x,
    mean,
    channel_scale,
    turns,
    factor,
    centroids,
    pages,
    scales,
    slots,
    n_pages,
    heads,
    x_batch,
    x_head,
    x_token,
    x_channel,
    page_slot,
    page_head,
    scale_slot,
    scale_head,
    HAS_MEAN: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    LAYOUT: tl.constexpr,
    STRETCH: tl.constexpr,
    SCALE: tl.constexpr,
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
    """Keys, or values."""
    encode_page(
        x,
        (x_batch, x_head, x_token, x_channel),
        mean,
        channel_scale,
        turns,
        factor,
        centroids,
        pages,
        (page_slot, page_head),
        scales,
        (scale_slot, scale_head),
        slots,
        n_pages,
        heads,
        HAS_MEAN,
        HAS_SCALE,
        LAYOUT,
        STRETCH,
        SCALE,
        SYMBOL,
        PAIRED,
        N,
        DIM,
        ROUNDS,
        ORDER,
        SIZE,
        INNER,
        WIDTH,
        BLOCK,
    )
