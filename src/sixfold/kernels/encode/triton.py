"""Encoding in Triton: one pass from vectors to packed codes in their pages."""

import torch
import triton
from jaxtyping import Float, Float16, Float32, Int64, UInt8
from torch import Tensor

from sixfold.kernels._tables import check_table, sequence_maps
from sixfold.kernels._triton import launch
from sixfold.kernels._triton.encode import encode_kernel, encode_pages_kernel
from sixfold.kernels._triton.operators import in_place, operator
from sixfold.kernels._triton.path_pages import encode_path_pages
from sixfold.kernels._triton.together import store_together, together
from sixfold.kernels.encode import reference
from sixfold.kernels.types import Coding, KeyMap, Pool, Scale
from sixfold.packing import Bits, Layout, n_symbols, row_bytes, symbol_bits


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
    rows, scales = _encode(x.detach(), turns, factor, centroids, float(bits), scale)
    return rows, scales


def encode_pages(
    x: Float[Tensor, "batch heads tokens dim"],
    slots: Int64[Tensor, "batch n_pages"],
    coding: Coding,
    layout: Layout,
    codes: UInt8[Tensor, "slots heads page_bytes"],
    scales: Float16[Tensor, "slots heads page_tokens"],
    key_map: KeyMap | None = None,
) -> None:
    """See `sixfold.kernels.encode.encode_pages`."""
    check_table("slots", slots, len(codes))
    if coding.code == "trellis" and not launch.encodes(x, _rotation(coding)):
        reference.encode_pages(x, slots, coding, layout, codes, scales, key_map)
        return
    (encode_path_pages if coding.code == "trellis" else _encode_pages)(
        x.detach(),
        *sequence_maps(key_map, len(slots), *x.shape[1::2]),
        coding.turns,
        coding.factor,
        coding.centroids,
        codes,
        scales,
        slots,
        float(coding.bits),
        coding.scale,
        layout,
    )


def store_pages(
    keys: Float[Tensor, "batch heads tokens key_dim"],
    values: Float[Tensor, "batch heads tokens value_dim"],
    slots: Int64[Tensor, "batch n_pages"],
    pool: Pool,
    key_coding: Coding,
    value_coding: Coding,
    key_map: KeyMap | None = None,
) -> None:
    """See `sixfold.kernels.encode.store_pages`: one launch where both sides are rotated alike."""
    if together(keys, values, key_coding, value_coding):
        store_together(keys, values, slots, pool, key_coding, value_coding, key_map)
    else:
        sides = keys, values, slots, pool, key_coding, value_coding, key_map
        reference.store_sides(encode_pages, *sides)


def _rotation(coding: Coding) -> dict[str, int]:
    return launch.rotation(coding.dim, coding.turns, coding.factor)


def _code_shapes(
    x: Tensor, turns: Tensor, factor: Tensor, centroids: Tensor, bits: float, scale: str
) -> tuple[Tensor, Tensor]:
    size = row_bytes(n_symbols(x.shape[-1], bits), symbol_bits(bits))
    rows = x.new_empty((*x.shape[:-1], size), dtype=torch.uint8)
    return rows, x.new_empty(x.shape[:-1], dtype=torch.float16)


@operator(
    "encode(Tensor x, Tensor turns, Tensor factor, Tensor centroids, float bits, str scale) "
    "-> (Tensor, Tensor)",
    _code_shapes,
)
def _encode(
    x: Tensor, turns: Tensor, factor: Tensor, centroids: Tensor, bits: float, scale: Scale
) -> tuple[Tensor, Tensor]:
    rotation = launch.rotation(x.shape[-1], turns, factor)
    if not launch.encodes(x, rotation):
        return reference.encode(x, turns, factor, centroids, bits=bits, scale=scale)
    batch, dim, count = x.shape[:-1], x.shape[-1], x.shape[:-1].numel()
    constants = rotation | launch.codebook(dim, bits, centroids)
    size = row_bytes(n_symbols(dim, bits), symbol_bits(bits))
    rows = torch.empty(*batch, size, dtype=torch.uint8, device=x.device)
    scales = torch.empty(batch, dtype=torch.float16, device=x.device)
    tile = launch.tile(constants)
    if count:
        encode_kernel[(triton.cdiv(count, tile["N"]),)](
            x.contiguous(),
            turns.contiguous(),
            factor.contiguous(),
            centroids.contiguous(),
            rows.view(torch.int32),
            scales,
            count,
            STRETCH=launch.stretch(rotation),
            SCALE=scale,
            **tile,
            **constants,
            **launch.EXACT,
        )
    return rows, scales


@operator(
    "encode_pages(Tensor x, Tensor? mean, Tensor? channel_scale, Tensor turns, Tensor factor, "
    "Tensor centroids, Tensor(a!) pages, Tensor(b!) scales, Tensor slots, float bits, str scale, "
    "str layout) -> ()",
    in_place,
)
def _encode_pages(
    x: Tensor,
    mean: Tensor | None,
    channel_scale: Tensor | None,
    turns: Tensor,
    factor: Tensor,
    centroids: Tensor,
    pages: Tensor,
    scales: Tensor,
    slots: Tensor,
    bits: float,
    scale: Scale,
    layout: Layout,
) -> None:
    rotation = launch.rotation(x.shape[-1], turns, factor)
    if not launch.encodes(x, rotation):
        coding = Coding(turns, factor, centroids, bits, x.shape[-1], scale)
        key_map = None if mean is None or channel_scale is None else KeyMap(mean, channel_scale)
        reference.encode_pages(x, slots, coding, layout, pages, scales, key_map)
        return
    constants = rotation | launch.codebook(x.shape[-1], bits, centroids)
    launch.check_pages(pages, scales, x.shape[-1], bits, "codebook")
    launch.check_vectors(x, scales, slots)
    grid, tile = launch.page_grid(slots, x.shape[1], rotation, least=4)
    if grid:
        words = pages.view(torch.int32)
        encode_pages_kernel[grid](
            x,
            mean,
            channel_scale,
            turns.contiguous(),
            factor.contiguous(),
            centroids.contiguous(),
            words,
            scales,
            slots.contiguous(),
            slots.shape[1],
            x.shape[1],
            *x.stride(),
            *words.stride()[:2],
            *scales.stride()[:2],
            HAS_MEAN=mean is not None,
            HAS_SCALE=channel_scale is not None,
            LAYOUT=layout,
            STRETCH=launch.stretch(rotation),
            SCALE=scale,
            **tile,
            **constants,
            **launch.EXACT,
        )
