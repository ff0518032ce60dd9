"""What the compiled extension takes, grouped as in csrc/python/bindings.h: checked addresses.

A DLPack exchange costs 2 µs a tensor, an address 0.2 µs, and a decode step passes dozens. The
extension trusts what it is given, so every address must come from here.
"""

from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sixfold.errors import ShapeError
from sixfold.kernels._operation import plain
from sixfold.kernels.types import CodeName, Coding, KeyMap, Pages, Tokens
from sixfold.packing import (
    PAGE_TOKENS,
    Bits,
    Layout,
    is_paired,
    n_symbols,
    row_bytes,
    symbol_bits,
)
from sixfold.trellis import PAGE_BITS, PAGE_STATES, path_bits, path_bytes, window_bits

# As csrc/vectors/vectors.h numbers them.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SCALES = {"norm": 0, "optimal": 1, "unbiased": 2}
LAYOUTS = {"rows": 0, "key": 1, "value": 2}

RotationGroup: TypeAlias = tuple[int, int, int, int, int]
CodeGroup: TypeAlias = tuple[int, int, bool, int, int]
PageCode: TypeAlias = tuple[CodeGroup, int]
SideGroup: TypeAlias = tuple[RotationGroup, PageCode]
PoolGroup: TypeAlias = tuple[int, int, int]
PagesGroup: TypeAlias = tuple[
    tuple[PoolGroup, PoolGroup, PoolGroup, PoolGroup, int], int, int, int, int, int, int
]
MaskGroup: TypeAlias = tuple[int, int, int, int, int, int, float]
NO_MASK: MaskGroup = (0, 0, 0, 0, 0, 0, 0.0)


def address(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Where the elements of a contiguous CPU tensor of this dtype and shape start.

    Raises:
        ShapeError: It is another tensor than that.
    """
    if x.dtype is not dtype or x.shape != shape or not (x.is_contiguous() and x.is_cpu):
        raise ShapeError(
            f"{name}: expected a contiguous {dtype} tensor {list(shape)} on the cpu, got "
            f"{x.dtype} {list(x.shape)} on {x.device}, strides {list(x.stride())}."
        )
    start = x.data_ptr()
    # Not by `memory`: a decode step passes dozens of tensors.
    return start if start or not x.numel() else memory(name, x)


def memory(name: str, x: Tensor) -> int:
    """Where the elements of a tensor on the CPU start.

    Raises:
        ShapeError: It is on another device, or it has elements, and nowhere (fake, lazy, or its
            storage was freed).
    """
    if not x.is_cpu:
        raise ShapeError(
            f"{name}: expected a tensor on the cpu, as the others are, got one on {x.device}: move "
            "it there."
        )
    start = x.data_ptr()
    if not start and x.numel():
        raise ShapeError(
            f"{name}: expected a tensor with its numbers in memory, got one without any: it is on "
            f"{x.device}, fake, lazy, or its storage was freed; clone it before."
        )
    return start


def rotation_blocks(dim: int, turns: Tensor, factor: Tensor) -> tuple[int, int, int]:
    """Rounds of a rotation, the order of its factor, and how many blocks of that order there are.

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
    return rounds, order, blocks


def rotation_group(dim: int, turns: Tensor, factor: Tensor) -> RotationGroup:
    """A rotation: dim, order, rounds and two addresses.

    Raises:
        ShapeError: The tensors are no rotation of `dim` coordinates.
    """
    rounds, order, _ = rotation_blocks(dim, turns, factor)
    turns_address = address("turns", turns, torch.float32, (rounds, 2, dim // 2))
    factor_address = address("factor", factor, torch.float32, (order, order))
    return dim, order, rounds, turns_address, factor_address


# By identity: what a step asks for in every layer. Cleared now and then, as it keeps what it names.
_codings: dict[tuple[int, str], tuple[Coding, tuple[int, int, int], SideGroup]] = {}
_MOST_CODINGS = 256


def side_group(coding: Coding, layout: Layout) -> SideGroup:
    """A rotation and codes in pages of this layout.

    Raises:
        ShapeError: The tensors do not fit each other.
    """
    turns, factor, centroids, _, dim = coding[:5]
    pointers = turns.data_ptr(), factor.data_ptr(), centroids.data_ptr()
    held, moved, group = _codings.get((id(coding), layout), (None, None, None))
    # What is remembered is that shapes fit. The memory of a tensor may move (`share_memory_`).
    if group is not None and held is coding and moved == pointers:
        return group
    made = rotation_group(dim, turns, factor), page_code(coding, layout)
    if len(_codings) >= _MOST_CODINGS:
        _codings.clear()
    _codings[id(coding), layout] = coding, pointers, made
    return made


def page_code(coding: Coding, layout: Layout) -> PageCode:
    """Codes in pages, and twice the bits a coordinate of a trellis, 0 of a codebook.

    Raises:
        ShapeError: The centroids do not fit, or pages hold no such trellis.
    """
    _, _, centroids, bits, dim, _, code = coding
    return code_group(dim, bits, centroids, layout, code), half_bits(bits, code)


def half_bits(bits: Bits, code: CodeName) -> int:
    """Twice the bits a coordinate of a trellis, 0 of a codebook."""
    return int(2 * bits) if code == "trellis" else 0


def code_group(
    dim: int, bits: Bits, centroids: Tensor, layout: str = "rows", code: CodeName = "codebook"
) -> CodeGroup:
    """Codes: dim, bits of a symbol or state, paired, layout and the codebook.

    Raises:
        ShapeError: `centroids` is no codebook of `bits`, or pages hold no such trellis.
    """
    symbol, paired, _, shape = page_sizes(dim, bits, code)
    book = address("centroids", centroids, torch.float32, shape)
    return dim, symbol, paired, LAYOUTS[layout], book


# Typed, as everywhere below operations: what a refused number of NumPy leaves, 4 must not find.
@lru_cache(typed=True)
def page_sizes(
    dim: int, bits: Bits, code: CodeName = "codebook"
) -> tuple[int, bool, int, tuple[int, ...]]:
    """Bits a symbol, whether one is a pair, bytes a page and shape of the codebook.

    Raises:
        ShapeError: Pages hold no such trellis.
    """
    if code == "trellis":
        window = window_bits(PAGE_STATES)
        if bits not in PAGE_BITS or path_bits(dim, bits) % 8 or path_bits(dim, bits) < window:
            raise ShapeError(
                f"trellis pages: expected {', '.join(map(str, PAGE_BITS))} bits a coordinate, and "
                f"dim·bits a multiple of 8, got bits={bits} and dim={dim}; use a codebook."
            )
        return window, False, PAGE_TOKENS * path_bytes(dim, bits), (PAGE_STATES,)
    width, paired = symbol_bits(bits), is_paired(bits)
    size = PAGE_TOKENS * row_bytes(n_symbols(dim, bits), width)
    return width, paired, size, (1 << width, 2) if paired else (1 << width,)


def pool_group(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, int, int]) -> PoolGroup:
    """A tensor of a pool: address, strides of slots and heads in elements.

    Raises:
        ShapeError: It is another tensor than that, or pages of it are not contiguous.
    """
    if x.dtype is not dtype or x.shape != shape or not x.is_cpu or x.stride(2) != 1:
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
    key_shape = slots, heads, page_sizes(keys.dim, keys.bits, keys.code)[2]
    value_shape = slots, heads, page_sizes(values.dim, values.bits, values.code)[2]
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


def contiguous_pages(part: Pages, copies: list[Tensor]) -> Pages:
    """The same with tables as `pages_group` reads them; those that had to be made are `copies`."""
    starts, lengths = part.starts, part.lengths
    if len(starts) != len(lengths):
        starts, lengths = torch.broadcast_tensors(starts, lengths)
    tables = [
        _int64(f"pages.{name}", x)
        for name, x in (("slots", part.slots), ("starts", starts), ("lengths", lengths))
    ]
    copies += [x for x, given in zip(tables, part[1:4], strict=True) if x is not given]
    return part._replace(slots=tables[0], starts=tables[1], lengths=tables[2])


def _int64(name: str, x: Tensor) -> Tensor:
    if x.is_floating_point() or x.is_complex() or x.dtype is torch.bool:
        raise ShapeError(f"{name}: expected whole numbers, got {x.dtype}.")
    return x.to(torch.int64).contiguous()


def vectors_group(
    name: str,
    x: Tensor,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    kept: list[Tensor],
) -> tuple[int, int, int, int]:
    """Uncompressed keys or values: address, strides of rows, heads and tokens in bytes.

    What had to be converted is added to `kept`, for the caller to keep while it is read.

    Raises:
        ShapeError: It is another tensor than that.
    """
    if x.stride(3) != 1 or x.is_neg() or x._is_zerotensor():
        x = plain(x).contiguous()
        kept.append(x)
    row, head, token, last = x.stride()
    # Of one coordinate the stride says nothing.
    whole = last == 1 or shape[3] == 1
    if x.dtype is not dtype or x.shape != shape or not x.is_cpu or not whole:
        raise ShapeError(
            f"{name}: expected a {dtype} tensor {list(shape)} on the cpu, contiguous in its last "
            f"axis, got {x.dtype} {list(x.shape)} on {x.device}, strides {list(x.stride())}."
        )
    size = dtype.itemsize
    return x.data_ptr() or memory(name, x), row * size, head * size, token * size


def tokens_group(
    part: Tokens,
    batch: int,
    heads: int,
    dims: tuple[int, int],
    dtype: torch.dtype,
    kept: list[Tensor],
) -> tuple[Any, ...]:
    """Uncompressed tokens; rows outside of them are the extension's to refuse.

    What had to be converted is added to `kept`, for the caller to keep while it is read.

    Raises:
        ShapeError: The tensors do not fit each other, the batch or the dims.
    """
    keys, values, first, start, stop, slots = part
    rows, _, count, _ = keys.shape
    return (
        vectors_group("tokens.keys", keys, dtype, (rows, heads, count, dims[0]), kept),
        vectors_group("tokens.values", values, dtype, (rows, heads, count, dims[1]), kept),
        rows,
        count,
        *numbers_group(batch, _TOKENS, (first, start, stop, slots), kept),
    )


_OPTIONAL = frozenset(("tokens.stop", "tokens.slots", "key_map.map_index"))
_TOKENS = "tokens.first", "tokens.start", "tokens.stop", "tokens.slots"


def numbers_group(
    batch: int,
    names: tuple[str, ...],
    tensors: tuple[Tensor | None, ...],
    kept: list[Tensor],
) -> list[int]:
    """A whole number a sequence each: addresses, 0 where there is none.

    What had to be converted is added to `kept`, for the caller to keep while it is read.

    Raises:
        ShapeError: One is another tensor than that.
    """
    found = []
    for name, x in zip(names, tensors, strict=True):
        if x is None:
            if name not in _OPTIONAL:
                raise ShapeError(
                    f"{name}: expected a number for each of {batch} sequences, got None"
                )
            found.append(0)
        # What `address` asks, without a call for each of what a step passes dozens of.
        elif x.dtype is torch.int64 and x.shape == (batch,) and x.is_contiguous() and x.is_cpu:
            found.append(x.data_ptr() or memory(name, x))
        else:
            kept.append(_int64(name, x))
            found.append(address(name, kept[-1], torch.int64, (batch,)))
    return found


def map_group(
    key_map: KeyMap, batch: int, heads: int, dim: int, kept: list[Tensor]
) -> tuple[int, ...]:
    """Mean, channel scale, how many maps there are, and which one each sequence has.

    Raises:
        ShapeError: The tensors do not fit each other.
    """
    mean, scale, index = key_map
    shape = mean.shape[0], heads, dim
    return (
        address("key_map.mean", mean, torch.float32, shape),
        address("key_map.scale", scale, torch.float32, shape),
        shape[0],
        *numbers_group(batch, ("key_map.map_index",), (index,), kept),
    )


def mask_group(mask: Tensor, batch: int, heads: int, queries: int) -> tuple[Tensor, MaskGroup]:
    """The mask in a dtype the extension reads, and how: broadcast axes have stride 0.

    Raises:
        ShapeError: It is no mask of these sizes.
    """
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
