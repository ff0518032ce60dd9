"""What comes before and after the search of paths: directions on its grid, and scales."""

import triton
import triton.language as tl

from sixfold.kernels._triton import paths
from sixfold.kernels._triton.encode import page_tile
from sixfold.kernels._triton.quantize import direction, stored_scale
from sixfold.kernels._triton.search import grid_places, grid_words


@triton.jit(do_not_specialize=["first"])
def path_vectors_kernel(
    x,
    mean,
    channel_scale,
    turns,
    factor,
    book,
    places,
    words,
    pages,
    scales,
    slots,
    first,
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
    SEARCHED: tl.constexpr,
    UNIT: tl.constexpr,
    INTERVALS: tl.constexpr,
    LARGEST: tl.constexpr,
    HALF_BITS: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    LAYOUT: tl.constexpr,
    STRETCH: tl.constexpr,
    SCALE: tl.constexpr,
    N: tl.constexpr,
    DIM: tl.constexpr,
    ROUNDS: tl.constexpr,
    ORDER: tl.constexpr,
    SIZE: tl.constexpr,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """N tokens of one head of a page a program: before the search their places, afterwards scales.

    Rotating twice costs a tenth of the search, and keeping directions as much memory as x.
    `first` is the first page of these programs; `places` and `words` are those of `search_kernel`.
    """
    parts: tl.constexpr = 64 // N
    number, head = tl.program_id(0) // parts, tl.program_id(1)
    page = first + number
    token = tl.program_id(0) % parts * N + tl.arange(0, N)
    tile = page_tile(
        x,
        (x_batch, x_head, x_token, x_channel),
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
    u, norm, power, finite, valid = direction(
        tile, turns, factor, STRETCH, DIM, ROUNDS, ORDER, SIZE, INNER, WIDTH, BLOCK
    )
    coordinate = tl.arange(0, SIZE)[None, :]
    if SEARCHED:
        slot = tl.load(slots + page)
        path = pages + slot * page_slot + head * page_head
        window = paths.window_words(
            path, token[:, None], coordinate, 1, HALF_BITS, DIM, LAYOUT == "key"
        )
        q = tl.load(book + paths.state_of(window, 0, HALF_BITS))
        q = tl.where(coordinate < DIM, q, 0.0)
        scale = stored_scale(u, q, norm, power, finite, valid, SCALE, DIM, True)
        tl.store(scales + slot * scale_slot + head * scale_head + token, scale)
    else:
        word = grid_words(book, UNIT, LARGEST)
        target = (number * heads + head).to(tl.int64) * (DIM * 64)
        target = target + coordinate * 64 + token[:, None]
        place = grid_places(u, word, UNIT, INTERVALS, LARGEST)
        tl.store(places + target, place.to(tl.int16), mask=coordinate < DIM)
        if tl.program_id(0) + head == 0:
            tl.store(words + tl.arange(0, 128), word.to(tl.int16))
