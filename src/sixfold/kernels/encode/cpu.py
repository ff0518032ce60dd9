"""Encoding by the compiled extension."""

import torch
from jaxtyping import Float, Float16, Float32, Int64, UInt8
from torch import Tensor

from sixfold.errors import ShapeError
from sixfold.kernels._native import address, compiled, memory
from sixfold.kernels.encode import Scale, Side, reference
from sixfold.kernels.rotate.cpu import DTYPES, rotation_group
from sixfold.packing import (
    PAGE_TOKENS,
    Bits,
    Layout,
    is_paired,
    n_symbols,
    row_bytes,
    symbol_bits,
)

_cpu = compiled()

# As csrc/vectors.h numbers them.
_SCALES = {"norm": 0, "optimal": 1, "unbiased": 2}
_LAYOUTS = {"rows": 0, "key": 1, "value": 2}


def code_group(
    dim: int, bits: Bits, centroids: Tensor, layout: str = "rows"
) -> tuple[int, int, bool, int, int]:
    """What the extension takes for codes: dim, symbol bits, paired, layout and the codebook.

    Raises:
        ShapeError: `centroids` is no codebook of `bits`.
    """
    symbol, paired = symbol_bits(bits), is_paired(bits)
    shape = (1 << symbol, 2) if paired else (1 << symbol,)
    book = address("centroids", centroids, torch.float32, shape)
    return dim, symbol, paired, _LAYOUTS[layout], book


def pages_group(
    pages: Tensor, scales: Tensor, slots: Tensor, dim: int, bits: Bits
) -> tuple[int, int, int, int, int, int]:
    """What the extension takes for pages; `slots` must be contiguous.

    Raises:
        ShapeError: The tensors do not fit each other or `bits`, or a slot is out of range.
    """
    n_slots, heads = scales.shape[0], scales.shape[1]
    size = PAGE_TOKENS * row_bytes(n_symbols(dim, bits), symbol_bits(bits))
    codes = address("pages", pages, torch.uint8, (n_slots, heads, size))
    stored = address("scales", scales, torch.float16, (n_slots, heads, PAGE_TOKENS))
    batch, n_pages = slots.shape
    where = address("slots", slots, torch.int64, (batch, n_pages))
    bad = _cpu.first_bad_slot(where, slots.numel(), n_slots)
    if bad >= 0:
        raise ShapeError(
            f"slots must be at least 0 and below {n_slots}, the number of pages, got "
            f"{int(slots.flatten()[bad])} for page {bad % n_pages} of sequence {bad // n_pages}; "
            "pass the table of the storage the pages are in"
        )
    return codes, stored, where, batch, n_pages, heads


def affine_maps(
    mean: Tensor | None, channel_scale: Tensor | None, shape: tuple[int, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """The maps as the extension takes them: contiguous float32.

    Raises:
        ShapeError: One of them is not [batch, heads, dim].
    """

    def checked(name: str, table: Tensor | None) -> Tensor | None:
        if table is None:
            return None
        if table.shape != shape or table.device.type != "cpu":
            raise ShapeError(
                f"{name}: expected one number a channel, {list(shape)} on the cpu, got "
                f"{list(table.shape)} on {table.device}"
            )
        return table.detach().float().contiguous()

    # The caller keeps them alive while the extension reads them.
    return checked("mean", mean), checked("channel_scale", channel_scale)


def affine_group(maps: tuple[Tensor | None, Tensor | None]) -> tuple[int, int]:
    """Addresses of `affine_maps`."""
    mean, channel_scale = (
        0 if table is None else memory("mean, channel_scale", table) for table in maps
    )
    return mean, channel_scale


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
    if x.dtype not in DTYPES:
        # Normalised in float64, which is not worth a kernel.
        return reference.encode(x, turns, factor, centroids, bits=bits, scale=scale)
    batch, dim = x.shape[:-1], x.shape[-1]
    rotation, code = rotation_group(dim, turns, factor), code_group(dim, bits, centroids)
    x, n = x.detach().contiguous(), batch.numel()
    rows = torch.empty(
        *batch, row_bytes(n_symbols(dim, bits), symbol_bits(bits)), dtype=torch.uint8
    )
    scales = torch.empty(batch, dtype=torch.float16)
    _cpu.encode(
        rotation,
        code,
        _SCALES[scale],
        memory("x", x),
        DTYPES[x.dtype],
        rows.data_ptr(),
        scales.data_ptr(),
        n,
        torch.get_num_threads(),
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
    """See `sixfold.kernels.encode.encode_pages`."""
    if x.dtype not in DTYPES:
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
    slots = slots.contiguous()
    batch, heads, tokens, dim = x.shape
    written = pages_group(pages, scales, slots, dim, bits)
    if (batch, tokens, heads) != (slots.shape[0], slots.shape[1] * PAGE_TOKENS, written[-1]):
        raise ShapeError(
            f"x: expected [{slots.shape[0]}, {written[-1]}, {slots.shape[1] * PAGE_TOKENS}, dim], "
            f"whole pages for slots {list(slots.shape)} of {written[-1]} heads, got {list(x.shape)}"
        )
    rotation, code = rotation_group(dim, turns, factor), code_group(dim, bits, centroids, layout)
    maps = affine_maps(mean, channel_scale, (batch, heads, dim))
    x = x.detach()
    if x.stride(-1) != 1:
        x = x.contiguous()
    size = x.element_size()
    strides = [stride * size for stride in x.stride()[:3]]
    _cpu.encode_pages(
        rotation,
        code,
        _SCALES[scale],
        affine_group(maps),
        (memory("x", x), DTYPES[x.dtype], *strides),
        written,
        torch.get_num_threads(),
    )


def store_pages(keys: Side, values: Side, slots: Int64[Tensor, "batch n_pages"]) -> None:
    """See `sixfold.kernels.encode.store_pages`."""
    encode_pages(**keys._asdict(), slots=slots)
    encode_pages(**values._asdict(), slots=slots)
