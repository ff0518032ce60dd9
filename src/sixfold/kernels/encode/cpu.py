"""Encoding by the compiled extension."""

from functools import partial

import torch
from jaxtyping import Float, Float16, Float32, Int64, UInt8
from torch import Tensor

from sixfold.errors import ShapeError
from sixfold.kernels._groups import (
    DTYPES,
    SCALES,
    PoolGroup,
    address,
    code_group,
    memory,
    pool_group,
    rotation_group,
)
from sixfold.kernels._native import compiled
from sixfold.kernels._tables import sequence_maps
from sixfold.kernels.encode import reference
from sixfold.kernels.trellis.cpu import path_group, search_of
from sixfold.kernels.types import Coding, KeyMap, Scale
from sixfold.packing import (
    PAGE_TOKENS,
    Bits,
    Layout,
    n_symbols,
    row_bytes,
    symbol_bits,
)

_cpu = compiled()


def page_group(
    codes: Tensor, scales: Tensor, slots: Tensor, coding: Coding
) -> tuple[PoolGroup, PoolGroup, int, int, int, int, int]:
    """What the extension takes for pages of one side: it refuses slots that are out of range.

    Raises:
        ShapeError: The tensors do not fit each other or the coding.
    """
    n_slots, heads = scales.shape[0], scales.shape[1]
    size = PAGE_TOKENS * row_bytes(*coding.row)
    return (
        pool_group("codes", codes, torch.uint8, (n_slots, heads, size)),
        pool_group("scales", scales, torch.float16, (n_slots, heads, PAGE_TOKENS)),
        n_slots,
        address("slots", slots, torch.int64, tuple(slots.shape)),
        *slots.shape,
        heads,
    )


def affine_group(maps: tuple[Tensor | None, Tensor | None]) -> tuple[int, int]:
    """Addresses of `sequence_maps`, which the caller keeps while the extension reads them."""
    mean, scale = maps
    if mean is None or scale is None:
        return 0, 0
    # Both have one shape.
    shape = tuple(mean.shape)
    return (
        address("key_map.mean", mean, torch.float32, shape),
        address("key_map.scale", scale, torch.float32, shape),
    )


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
    size = row_bytes(n_symbols(dim, bits), symbol_bits(bits))
    rows = torch.empty(*batch, size, dtype=torch.uint8, device="cpu")
    scales = torch.empty(batch, dtype=torch.float16, device="cpu")
    _cpu.encode(
        rotation,
        code,
        SCALES[scale],
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
    slots: Int64[Tensor, "batch n_pages"],
    coding: Coding,
    layout: Layout,
    codes: UInt8[Tensor, "slots heads page_bytes"],
    scales: Float16[Tensor, "slots heads page_tokens"],
    key_map: KeyMap | None = None,
) -> None:
    """See `sixfold.kernels.encode.encode_pages`."""
    if x.dtype not in DTYPES:
        reference.encode_pages(x, slots, coding, layout, codes, scales, key_map)
        return
    slots, heads = slots.contiguous(), scales.shape[1]
    expected = (slots.shape[0], heads, slots.shape[1] * PAGE_TOKENS, coding.dim)
    if x.shape != expected:
        raise ShapeError(
            f"x: expected {list(expected)}, whole pages for slots {list(slots.shape)} of {heads} "
            f"heads, got {list(x.shape)}"
        )
    maps = sequence_maps(key_map, slots.shape[0], heads, coding.dim)
    x = x.detach()
    if x.stride(-1) != 1:
        x = x.contiguous()
    size = x.element_size()
    strides = [stride * size for stride in x.stride()[:3]]
    rotation = rotation_group(coding.dim, coding.turns, coding.factor)
    rest = (
        SCALES[coding.scale],
        affine_group(maps),
        (memory("x", x), DTYPES[x.dtype], *strides),
        page_group(codes, scales, slots, coding),
        torch.get_num_threads(),
    )
    described = coding.dim, coding.bits, coding.centroids, layout
    if coding.code == "trellis":
        path, search = path_group(*described), search_of(coding.centroids, coding.bits)
        _cpu.encode_path_pages(rotation, (path, search.grid), *rest)
    else:
        _cpu.encode_pages(rotation, code_group(*described), *rest)


store_pages = partial(reference.store_sides, encode_pages)
