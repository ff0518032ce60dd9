"""What the compiled extension takes, grouped as in csrc/python/bindings.h: checked addresses."""

from functools import lru_cache
from typing import TypeAlias

import torch
from torch import Tensor

from sixfold.errors import ShapeError
from sixfold.kernels._native import address, memory
from sixfold.kernels.types import Coding, KeyMap, Pages, Tokens
from sixfold.packing import (
    PAGE_TOKENS,
    Bits,
    is_paired,
    n_symbols,
    row_bytes,
    symbol_bits,
)

# As csrc/vectors/vectors.h numbers them.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SCALES = {"norm": 0, "optimal": 1, "unbiased": 2}
_LAYOUTS = {"rows": 0, "key": 1, "value": 2}

RotationGroup: TypeAlias = tuple[int, int, int, int, int]
CodeGroup: TypeAlias = tuple[int, int, bool, int, int]
PoolGroup: TypeAlias = tuple[int, int, int]
PagesGroup: TypeAlias = tuple[
    tuple[PoolGroup, PoolGroup, PoolGroup, PoolGroup, int], int, int, int, int, int, int
]
MaskGroup: TypeAlias = tuple[int, int, int, int, int, int, float]
NO_MASK: MaskGroup = (0, 0, 0, 0, 0, 0, 0.0)


def rotation_group(dim: int, turns: Tensor, factor: Tensor) -> RotationGroup:
    """A rotation: dim, order, rounds and two addresses.

    Raises:
        ShapeError: The tensors are no rotation of `dim` coordinates.
    """
    rounds, order = len(turns), len(factor)
    blocks = dim // order if order else 0
    # Rounds work on blocks of 4 rows of the factor: all orders above 2 that Hadamard matrices have.
    valid = order == dim if rounds == 0 else order == 1 or order % 4 == 0
    if not valid or blocks * order != dim or blocks & (blocks - 1) or (rounds and dim % 2):
        raise ShapeError(
            f"expected a factor of order m with dim = m·2^k (m = 1 or a multiple of 4; m = dim "
            f"without rounds), got order {order}, {rounds} rounds and dim {dim}; take both "
            f"tensors from one sixfold.rotation.Rotation({dim})"
        )
    turns_address = address("turns", turns, torch.float32, (rounds, 2, dim // 2))
    factor_address = address("factor", factor, torch.float32, (order, order))
    return dim, order, rounds, turns_address, factor_address


def code_group(dim: int, bits: Bits, centroids: Tensor, layout: str = "rows") -> CodeGroup:
    """Codes: dim, symbol bits, paired, layout and the codebook.

    Raises:
        ShapeError: `centroids` is no codebook of `bits`.
    """
    symbol, paired, _, shape = page_sizes(dim, bits)
    book = address("centroids", centroids, torch.float32, shape)
    return dim, symbol, paired, _LAYOUTS[layout], book


@lru_cache
def page_sizes(dim: int, bits: Bits) -> tuple[int, bool, int, tuple[int, ...]]:
    """Bits a symbol, whether one is a pair, bytes a page and shape of the codebook."""
    width, paired = symbol_bits(bits), is_paired(bits)
    size = PAGE_TOKENS * row_bytes(n_symbols(dim, bits), width)
    return width, paired, size, (1 << width, 2) if paired else (1 << width,)


def pool_group(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, int, int]) -> PoolGroup:
    """A tensor of a pool: address, strides of slots and heads in elements.

    Raises:
        ShapeError: It is another tensor than that, or pages of it are not contiguous.
    """
    if x.dtype is not dtype or x.shape != shape or x.device.type != "cpu" or x.stride(2) != 1:
        raise ShapeError(
            f"{name}: expected a {dtype} tensor {list(shape)} on the cpu, contiguous in its last "
            f"axis, got {x.dtype} {list(x.shape)} on {x.device}, strides {list(x.stride())}."
        )
    return memory(name, x), x.stride(0), x.stride(1)


def pages_group(part: Pages, batch: int, heads: int, keys: Coding, values: Coding) -> PagesGroup:
    """A page table and the pool it is for. The table's numbers are the extension's to check.

    Raises:
        ShapeError: The tensors do not fit each other, the batch or the codings.
    """
    key_codes, key_scales, value_codes, value_scales = part.pool
    slots, count = len(key_codes), part.slots.shape[1]
    key_shape = slots, heads, page_sizes(keys.dim, keys.bits)[2]
    value_shape = slots, heads, page_sizes(values.dim, values.bits)[2]
    scale_shape = slots, heads, PAGE_TOKENS
    shared = len(part.starts) == 1 and len(part.lengths) == 1
    spread = (1 if shared else batch, count)
    return (
        (
            pool_group("pages.pool.key_codes", key_codes, torch.uint8, key_shape),
            pool_group("pages.pool.key_scales", key_scales, torch.float16, scale_shape),
            pool_group("pages.pool.value_codes", value_codes, torch.uint8, value_shape),
            pool_group("pages.pool.value_scales", value_scales, torch.float16, scale_shape),
            slots,
        ),
        address("pages.slots", part.slots, torch.int64, (batch, count)),
        address("pages.starts", part.starts, torch.int64, spread),
        address("pages.lengths", part.lengths, torch.int64, spread),
        count,
        0 if shared else count,
        part.first,
    )


def contiguous_pages(part: Pages) -> Pages:
    """The same with tables as `pages_group` reads them."""
    starts, lengths = part.starts, part.lengths
    if len(starts) != len(lengths):
        starts, lengths = torch.broadcast_tensors(starts, lengths)
    slots, starts, lengths = (_int64(x) for x in (part.slots, starts, lengths))
    return part._replace(slots=slots, starts=starts, lengths=lengths)


def _int64(x: Tensor) -> Tensor:
    return x.to(torch.int64).contiguous()


def vectors_group(
    name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]
) -> tuple[int, int, int, int]:
    """Uncompressed keys or values: address, strides of rows, heads and tokens in bytes.

    Raises:
        ShapeError: It is another tensor than that, or vectors are not contiguous.
    """
    row, head, token, last = x.stride()
    # Of one coordinate the stride says nothing.
    whole = last == 1 or shape[-1] == 1
    if x.dtype is not dtype or x.shape[1:] != shape or x.device.type != "cpu" or not whole:
        raise ShapeError(
            f"{name}: expected a {dtype} tensor {['rows', *shape]} on the cpu, contiguous in its "
            f"last axis, got {x.dtype} {list(x.shape)} on {x.device}, strides {list(x.stride())}."
        )
    size = dtype.itemsize
    return memory(name, x), row * size, head * size, token * size


def tokens_group(
    part: Tokens, batch: int, heads: int, dims: tuple[int, int], dtype: torch.dtype
) -> tuple[tuple[int, ...], tuple[int, ...], int, int, int, int, int, int]:
    """Uncompressed tokens; rows outside of them are the extension's to refuse.

    Raises:
        ShapeError: The tensors do not fit each other, the batch or the dims.
    """
    rows, _, count, _ = part.keys.shape
    if len(part.values) != rows:
        raise ShapeError(
            f"tokens.values: expected {rows} rows, as many as there are of keys, got "
            f"{len(part.values)}."
        )
    slots = part.slots
    return (
        vectors_group("tokens.keys", part.keys, dtype, (heads, count, dims[0])),
        vectors_group("tokens.values", part.values, dtype, (heads, count, dims[1])),
        rows,
        count,
        address("tokens.first", part.first, torch.int64, (batch,)),
        address("tokens.start", part.start, torch.int64, (batch,)),
        address("tokens.stop", part.stop, torch.int64, (batch,)),
        0 if slots is None else address("tokens.slots", slots, torch.int64, (batch,)),
    )


def map_group(key_map: KeyMap, batch: int, heads: int, dim: int) -> tuple[int, int, int, int]:
    """Mean, channel scale, how many maps there are, and which one each sequence has.

    Raises:
        ShapeError: The tensors do not fit each other.
    """
    mean, scale, index = key_map
    shape = len(mean), heads, dim
    return (
        address("key_map.mean", mean, torch.float32, shape),
        address("key_map.scale", scale, torch.float32, shape),
        len(mean),
        0 if index is None else address("key_map.map_index", index, torch.int64, (batch,)),
    )


def mask_group(
    mask: Tensor | None, batch: int, heads: int, queries: int
) -> tuple[Tensor | None, MaskGroup]:
    """The mask in a dtype the extension reads, and how: broadcast axes have stride 0.

    Raises:
        ShapeError: It is no mask of these sizes.
    """
    if mask is None:
        return None, NO_MASK
    additive = mask.dtype != torch.bool
    if additive and not mask.is_floating_point():
        raise ShapeError(
            f"mask: expected bool or floating point, got {mask.dtype}; pass mask != 0."
        )
    # Hosts write "never" as the lowest finite number of a narrow dtype, see dense.apply_mask.
    never = torch.finfo(mask.dtype).min / 2 if additive else 0.0
    readable = mask.to(torch.float32 if additive else torch.bool).contiguous()
    strides = mask_strides(readable, batch, heads, queries)
    return readable, (1 + additive, memory("mask", readable), *strides, mask.shape[-1], never)


def mask_strides(mask: Tensor, batch: int, heads: int, queries: int) -> tuple[int, int, int]:
    """Strides of a mask by sequence, head and query; 0 on broadcast axes.

    Raises:
        ShapeError: It is no mask of these sizes.
    """
    try:
        by_batch, by_head, by_query, _ = mask.expand(batch, heads, queries, -1).stride()
    except RuntimeError:
        raise ShapeError(
            f"mask: expected [{batch} or 1, {heads} or 1, {queries}, positions], got "
            f"{list(mask.shape)}; pass one row a query."
        ) from None
    return by_batch, by_head, by_query


def check_heads(heads: int, kv_heads: int) -> None:
    """Refuse query heads that do not share the KV heads evenly.

    Raises:
        ShapeError: They do not.
    """
    if kv_heads == 0 or heads % kv_heads:
        raise ShapeError(
            f"query: expected a multiple of the {kv_heads} KV heads of the pages, got {heads} "
            "heads; pass the pages of this layer."
        )
