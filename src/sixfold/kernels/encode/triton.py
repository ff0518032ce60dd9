"""Encoding in Triton: one pass from vectors to packed codes in their pages."""

import math

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float16, Float32, Int64, UInt8
from torch import Tensor

from sixfold.errors import ShapeError
from sixfold.kernels._triton import launch
from sixfold.kernels._triton.pack import store_symbols
from sixfold.kernels._triton.quantize import encode_tile
from sixfold.kernels._triton.rotate import coordinates, inside
from sixfold.kernels.encode import Scale, reference
from sixfold.packing import PAGE_TOKENS, Bits, Layout, n_symbols, row_bytes, symbol_bits


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
    """N tokens of one head of a page a program; strides in elements, of int32 for pages."""
    parts: tl.constexpr = 64 // N
    page, head = tl.program_id(0) // parts, tl.program_id(1)
    batch = page // n_pages
    token = tl.program_id(0) % parts * N + tl.arange(0, N)
    coordinate, channels = coordinates(SIZE, INNER, WIDTH), inside(DIM, SIZE, INNER, WIDTH)
    start = x + batch.to(tl.int64) * x_batch + head.to(tl.int64) * x_head
    position = (page % n_pages * 64 + token).to(tl.int64)
    tile = tl.load(
        start + position[:, None] * x_token + coordinate[None, :] * x_channel,
        mask=channels[None, :],
        other=0.0,
    ).to(tl.float32)
    channel = (batch * heads + head) * DIM + coordinate
    if HAS_MEAN:
        tile = tile - tl.load(mean + channel, mask=channels, other=0.0)[None, :]
    if HAS_SCALE:
        tile = tile * tl.load(channel_scale + channel, mask=channels, other=0.0)[None, :]
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
    out = pages + slot * page_slot + head * page_head
    store_symbols(out, symbol, token, token < 64, SYMBOL, PAIRED, DIM, LAYOUT)
    tl.store(scales + slot * scale_slot + head * scale_head + token, scale)


def encode(
    x: Float[Tensor, "*b dim"],
    turns: Float[Tensor, "rounds 2 half"],
    factor: Float[Tensor, "m m"],
    centroids: Float32[Tensor, " levels *pair"],
    *,
    bits: Bits,
    scale: Scale,
) -> tuple[UInt8[Tensor, "*b row_bytes"], Float16[Tensor, "*b"]]:
    """See `sixfold.kernels.encode.encode`."""
    rotation = launch.rotation(x.shape[-1], turns, factor)
    if not _fused(x, rotation):
        return reference.encode(x, turns, factor, centroids, bits=bits, scale=scale)
    batch, dim, count = x.shape[:-1], x.shape[-1], x.shape[:-1].numel()
    constants = rotation | launch.codebook(dim, bits, centroids)
    size = row_bytes(n_symbols(dim, bits), symbol_bits(bits))
    rows = torch.empty(*batch, size, dtype=torch.uint8, device=x.device)
    scales = torch.empty(batch, dtype=torch.float16, device=x.device)
    tile = launch.tile(constants)
    if count:
        encode_kernel[(triton.cdiv(count, tile["N"]),)](
            x.detach().contiguous(),
            turns.contiguous(),
            factor.contiguous(),
            centroids.contiguous(),
            rows.view(torch.int32),
            scales,
            count,
            STRETCH=math.pow(dim, 1 / 2 - len(turns) / 2),
            SCALE=scale,
            **tile,
            **constants,
            **launch.EXACT,
        )
    return rows, scales


def encode_pages(
    x: Float[Tensor, "batch heads tokens dim"],
    mean: Float[Tensor, "batch heads dim"] | None,
    channel_scale: Float[Tensor, "batch heads dim"] | None,
    turns: Float[Tensor, "rounds 2 half"],
    factor: Float[Tensor, "m m"],
    centroids: Float32[Tensor, " levels *pair"],
    *,
    bits: Bits,
    scale: Scale,
    layout: Layout,
    pages: UInt8[Tensor, "slots heads page_bytes"],
    scales: Float16[Tensor, "slots heads page_tokens"],
    slots: Int64[Tensor, "batch n_pages"],
) -> None:
    """See `sixfold.kernels.encode.encode_pages`.

    Slots are trusted: looking at them would wait for the device.
    """
    rotation = launch.rotation(x.shape[-1], turns, factor)
    if not _fused(x, rotation):
        reference.encode_pages(
            x,
            mean,
            channel_scale,
            turns,
            factor,
            centroids,
            bits=bits,
            scale=scale,
            layout=layout,
            pages=pages,
            scales=scales,
            slots=slots,
        )
        return
    heads, dim = x.shape[1], x.shape[-1]
    batch, n_pages = slots.shape
    constants = rotation | launch.codebook(dim, bits, centroids)
    launch.check_pages(pages, scales, constants)
    _check_vectors(x, scales, slots)
    if not slots.numel() * heads:
        return
    words = pages.view(torch.int32)
    tile = launch.tile(constants, least=4)
    encode_pages_kernel[(batch * n_pages * (PAGE_TOKENS // tile["N"]), heads)](
        x.detach(),
        None if mean is None else mean.detach().float().contiguous(),
        None if channel_scale is None else channel_scale.detach().float().contiguous(),
        turns.contiguous(),
        factor.contiguous(),
        centroids.contiguous(),
        words,
        scales,
        slots.contiguous(),
        n_pages,
        heads,
        *x.stride(),
        *words.stride()[:2],
        *scales.stride()[:2],
        HAS_MEAN=mean is not None,
        HAS_SCALE=channel_scale is not None,
        LAYOUT=layout,
        STRETCH=math.pow(dim, 1 / 2 - len(turns) / 2),
        SCALE=scale,
        **tile,
        **constants,
        **launch.EXACT,
    )


def _fused(x: Tensor, rotation: dict[str, int]) -> bool:
    """Whether one kernel does it; otherwise plain PyTorch does, on the same device.

    float64 is normalised in float64. Padded tiles of more than 512 columns change their order
    through more registers than a thread has.
    """
    padded = rotation["SIZE"] != rotation["DIM"]
    return x.dtype is not torch.float64 and not (padded and rotation["SIZE"] > 512)


def _check_vectors(x: Tensor, scales: Tensor, slots: Tensor) -> None:
    heads = scales.shape[1]
    expected = (slots.shape[0], heads, slots.shape[1] * PAGE_TOKENS)
    if x.shape[:3] != expected:
        raise ShapeError(
            f"x: expected [{expected[0]}, {expected[1]}, {expected[2]}, dim], whole pages for "
            f"slots {list(slots.shape)} of {heads} heads, got {list(x.shape)}"
        )
