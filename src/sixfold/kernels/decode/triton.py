"""Decoding in Triton: codes are read once, vectors written once."""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float16, Float32, Int64, UInt8
from torch import Tensor

from sixfold.errors import ShapeError
from sixfold.kernels._triton import launch
from sixfold.kernels._triton.rotate import coordinates, inside, unnormalized
from sixfold.kernels._triton.unpack import codewords
from sixfold.kernels.decode import reference
from sixfold.packing import PAGE_TOKENS, Bits, Layout, n_symbols, row_bytes, symbol_bits


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
        rows, vector, mask, scale, centroids, SYMBOL, PAIRED, "rows", DIM, SIZE, INNER, WIDTH
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
    tl.store(out + offset, tile.to(out.dtype.element_ty), mask=channels[None, :])


def decode(
    rows: UInt8[Tensor, "*b row_bytes"],
    scales: Float16[Tensor, "*b"],
    turns: Float[Tensor, "rounds 2 half"],
    factor: Float[Tensor, "m m"],
    centroids: Float32[Tensor, " levels *pair"],
    *,
    dim: int,
    bits: Bits,
) -> Float32[Tensor, "*b {dim}"]:
    """See `sixfold.kernels.decode.decode`."""
    constants = launch.rotation(dim, turns, factor) | launch.codebook(dim, bits, centroids)
    size = row_bytes(n_symbols(dim, bits), symbol_bits(bits))
    if rows.shape != (*scales.shape, size):
        raise ShapeError(f"rows: expected {[*scales.shape, size]}, got {list(rows.shape)}")
    count, tile = scales.numel(), launch.tile(constants)
    out = torch.empty(*scales.shape, dim, dtype=torch.float32, device=rows.device)
    if count:
        decode_kernel[(triton.cdiv(count, tile["N"]),)](
            rows.contiguous(),
            scales.contiguous(),
            turns.contiguous(),
            factor.contiguous(),
            centroids.contiguous(),
            out,
            count,
            SHRINK=math.pow(dim, -len(turns) / 2),
            **tile,
            **constants,
            **launch.EXACT,
        )
    return out


def decode_pages(
    pages: UInt8[Tensor, "slots heads page_bytes"],
    scales: Float16[Tensor, "slots heads page_tokens"],
    slots: Int64[Tensor, "batch n_pages"],
    mean: Float[Tensor, "batch heads dim"] | None,
    channel_scale: Float[Tensor, "batch heads dim"] | None,
    turns: Float[Tensor, "rounds 2 half"],
    factor: Float[Tensor, "m m"],
    centroids: Float32[Tensor, " levels *pair"],
    *,
    dim: int,
    bits: Bits,
    layout: Layout,
    dtype: torch.dtype,
) -> Float[Tensor, "batch heads tokens {dim}"]:
    """See `sixfold.kernels.decode.decode_pages`. Slots are trusted, as in `encode_pages`."""
    constants = launch.rotation(dim, turns, factor) | launch.codebook(dim, bits, centroids)
    return _decode_pages(
        pages,
        scales,
        slots,
        (mean, channel_scale),
        (turns, factor, centroids),
        dtype,
        {**constants, "LAYOUT": layout, "ROTATED": False},
    )


def expand_pages(
    pages: UInt8[Tensor, "*b page_bytes"],
    scales: Float16[Tensor, "*b page_tokens"],
    centroids: Float32[Tensor, " levels *pair"],
    *,
    dim: int,
    bits: Bits,
    layout: Layout,
) -> Float32[Tensor, "*b page_tokens {dim}"]:
    """See `sixfold.kernels.decode.expand_pages`."""
    if scales.shape[-1] != PAGE_TOKENS:
        return reference.expand_pages(pages, scales, centroids, dim=dim, bits=bits, layout=layout)
    turns, factor = pages.new_empty(0, 2, dim // 2), pages.new_empty(dim, dim)
    constants = launch.rotation(dim, turns, factor) | launch.codebook(dim, bits, centroids)
    flat, flat_scales = pages.flatten(0, -2), scales.flatten(0, -2)
    slots = torch.arange(len(flat), device=pages.device)[:, None]
    out = _decode_pages(
        flat[:, None],
        flat_scales[:, None],
        slots,
        (None, None),
        (turns, factor, centroids),
        torch.float32,
        {**constants, "LAYOUT": layout, "ROTATED": True},
    )
    return out.view(*scales.shape, dim)


def _decode_pages(
    pages: Tensor,
    scales: Tensor,
    slots: Tensor,
    maps: tuple[Tensor | None, Tensor | None],
    tables: tuple[Tensor, Tensor, Tensor],
    dtype: torch.dtype,
    constants: dict[str, Any],
) -> Tensor:
    launch.check_pages(pages, scales, constants)
    (batch, n_pages), heads, dim = slots.shape, pages.shape[1], constants["DIM"]
    # The interpreter cuts bfloat16 off where a processor rounds it.
    written = torch.float32 if launch.interpreted() and dtype is torch.bfloat16 else dtype
    shape = (batch, heads, n_pages * PAGE_TOKENS, dim)
    out = torch.empty(shape, dtype=written, device=pages.device)
    mean, channel_scale = (None if m is None else m.detach().float().contiguous() for m in maps)
    tile = launch.tile(constants)
    if out.numel():
        decode_pages_kernel[(batch * n_pages * (PAGE_TOKENS // tile["N"]), heads)](
            pages,
            scales,
            slots.contiguous(),
            mean,
            channel_scale,
            *(table.contiguous() for table in tables),
            out,
            n_pages,
            heads,
            *pages.stride()[:2],
            *scales.stride()[:2],
            HAS_MEAN=mean is not None,
            HAS_SCALE=channel_scale is not None,
            SHRINK=math.pow(dim, -constants["ROUNDS"] / 2),
            **tile,
            **constants,
            **launch.EXACT,
        )
    return out.to(dtype)
