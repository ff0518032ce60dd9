"""Attention on a GPU: the reference's steps, each on its own kernels.

Pages (kernels/_triton/attention.py) and rotations, whose cost grows with the history or the model,
are Triton's. What remains is small tensors, in PyTorch, without a host synchronisation, as the
capture of a CUDA graph demands.
"""

import math
from functools import cache, lru_cache, partial
from typing import Any

import torch
import triton
from jaxtyping import Float32, Int
from torch import Tensor

from sixfold._surroundings import outside_inference_mode
from sixfold.errors import ShapeError
from sixfold.kernels._groups import check_heads, half_bits, mask_strides, page_sizes
from sixfold.kernels._tables import check_pages
from sixfold.kernels._triton.attention import attend_pages, merge_ranges
from sixfold.kernels._triton.operators import operator
from sixfold.kernels._triton.paths import WINDOWS
from sixfold.kernels.attention.merge import Partial
from sixfold.kernels.attention.parts import attend_parts
from sixfold.kernels.types import CodeName, Coding, Mask, Pages
from sixfold.packing import Bits, n_symbols, plane_bytes, planes
from sixfold.trellis import PAGE_STATES, codewords

# Columns of a tile of levels; more are taken in several.
MAX_BLOCK = 128
MIN_ROWS = 8
# Programs a multiprocessor: what hides the latency of memory.
PROGRAMS_PER_MULTIPROCESSOR = 4
# The interpreter has no multiprocessors; two splits exercise the merge.
INTERPRETED_PROGRAMS = 2


def page_attention(
    query: Float32[Tensor, "batch heads queries key_dim"],
    pages: Pages,
    keys: Coding,
    values: Coding,
    first_token: Int[Tensor, "batch queries"],
    *,
    logit_offset: Float32[Tensor, "batch heads queries"] | None = None,
    mask: Mask | None = None,
    softcap: float | None = None,
) -> Partial:
    """See `sixfold.kernels.attention.parts.PageAttention`."""
    check_pages(pages)
    out, lse = _page_attention(
        query,
        *pages.pool,
        *pages[1:4],
        first_token,
        keys.centroids,
        values.centroids,
        pages.first,
        float(keys.bits),
        float(values.bits),
        keys.code,
        values.code,
        values.dim,
        logit_offset,
        mask,
        softcap,
    )
    return Partial(out, lse)


attention = partial(attend_parts, page_attention)


def _page_attention_shapes(query: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    value_dim = arguments[15]
    batch, heads, queries, _ = query.shape
    return (
        query.new_empty(batch, heads, queries, value_dim, dtype=torch.float32),
        query.new_empty(batch, heads, queries, dtype=torch.float32),
    )


@operator(
    "page_attention(Tensor query, Tensor key_codes, Tensor key_scales, Tensor value_codes, "
    "Tensor value_scales, Tensor slots, Tensor starts, Tensor lengths, Tensor first_token, "
    "Tensor key_centroids, Tensor value_centroids, SymInt origin, float key_bits, "
    "float value_bits, str key_code, str value_code, SymInt value_dim, Tensor? logit_offset, "
    "Tensor? mask, float? softcap) "
    "-> (Tensor, Tensor)",
    _page_attention_shapes,
)
def _page_attention(
    query: Tensor,
    key_codes: Tensor,
    key_scales: Tensor,
    value_codes: Tensor,
    value_scales: Tensor,
    slots: Tensor,
    starts: Tensor,
    lengths: Tensor,
    first_token: Tensor,
    key_centroids: Tensor,
    value_centroids: Tensor,
    origin: int,
    key_bits: float,
    value_bits: float,
    key_code: CodeName,
    value_code: CodeName,
    value_dim: int,
    logit_offset: Tensor | None,
    mask: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    batch, heads, queries, key_dim = query.shape
    kv_heads, pages = key_codes.shape[1], slots.shape[1]
    check_heads(heads, kv_heads)
    keys, values = (key_dim, key_bits, key_code), (value_dim, value_bits, value_code)
    _check("key", key_codes, key_scales, key_centroids, *keys)
    _check("value", value_codes, value_scales, value_centroids, *values)
    rows = heads // kv_heads * queries
    constants = page_constants(keys, values)
    block_rows = min(max_rows(constants), max(MIN_ROWS, triton.next_power_of_2(rows)))
    blocks = triton.cdiv(rows, block_rows) * constants["VALUE_BLOCKS"]
    splits = _splits(query.device, blocks * batch * kv_heads, pages)
    shape = (splits, batch, heads, queries)
    out = torch.empty((*shape, value_dim), dtype=torch.float32, device=query.device)
    lse = torch.empty(shape, dtype=torch.float32, device=query.device)
    if not lse.numel():
        return out[0], lse[0]
    if not pages:
        return out[0].zero_(), lse[0].fill_(-math.inf)
    readable, strides, columns, never = _mask_arguments(mask, batch, heads, queries)
    tables = [x if x.stride(1) == 1 else x.contiguous() for x in (slots, starts, lengths)]
    pool = key_codes, key_scales, value_codes, value_scales
    attend_pages[(splits, blocks, batch * kv_heads)](
        query.contiguous(),
        key_codes,
        key_scales,
        value_codes,
        value_scales,
        *tables,
        first_token,
        _levels(key_centroids, key_bits, key_code),
        _levels(value_centroids, value_bits, value_code),
        None if logit_offset is None else logit_offset.contiguous(),
        readable,
        out,
        lse,
        kv_heads,
        pages,
        rows,
        queries,
        origin,
        *[x.stride(0) if len(x) > 1 else 0 for x in tables],
        *[stride for x in pool for stride in x.stride()[:2]],
        *first_token.stride(),
        *strides,
        columns,
        never,
        softcap or 0.0,
        BLOCK_ROWS=block_rows,
        OFFSET=logit_offset is not None,
        MASK=mask is not None,
        ADDITIVE=mask is not None and mask.dtype != torch.bool,
        SOFTCAP=softcap is not None,
        PERMUTE=not triton.knobs.runtime.interpret,
        **constants,
        **launch_options(block_rows, constants),
    )
    if splits == 1:
        return out[0], lse[0]
    merged, merged_lse = torch.empty_like(out[0]), torch.empty_like(lse[0])
    merge_ranges[(merged_lse.numel(),)](
        out,
        lse,
        merged,
        merged_lse,
        splits,
        merged_lse.numel(),
        DIM=value_dim,
        BLOCK=triton.next_power_of_2(value_dim),
        num_warps=1,
    )
    return merged, merged_lse


def page_constants(
    keys: tuple[int, Bits, CodeName], values: tuple[int, Bits, CodeName]
) -> dict[str, int | bool]:
    """What of the sides' dimensions, bits and codes the kernel is compiled for."""
    constants: dict[str, int | bool] = {}
    for name, (dim, bits, code) in (("KEY", keys), ("VALUE", values)):
        symbol, paired, _, _ = page_sizes(dim, bits, code)
        if code == "trellis":
            parts = WINDOWS.value
            size = triton.cdiv(dim, parts)
        else:
            width = planes(symbol)[0]
            parts = 8 // width * (1 + paired)
            size = plane_bytes(n_symbols(dim, bits), width)
        block = min(MAX_BLOCK, max(16, triton.next_power_of_2(size)))
        constants |= {
            f"{name}_DIM": dim,
            f"{name}_SYMBOL_BITS": symbol,
            f"{name}_PAIRED": paired,
            f"{name}_HALF_BITS": half_bits(bits, code),
            f"BLOCK_{name}": block,
            f"{name}_BLOCKS": triton.cdiv(size, block),
            f"{name}_PARTS": parts,
        }
    return constants


def max_rows(constants: dict[str, Any]) -> int:
    """Query rows of a program: what lookups and planes leave registers for, without spills."""
    if constants["KEY_PAIRED"] or constants["VALUE_PAIRED"]:
        return MIN_ROWS
    planes_apart = 3 in (constants["KEY_SYMBOL_BITS"], constants["VALUE_SYMBOL_BITS"])
    return 16 if planes_apart or _looked_up(constants) else 32


def launch_options(block_rows: int, constants: dict[str, Any]) -> dict[str, int]:
    """Warps and stages: more warps where sums and levels would not fit the registers of four."""
    widest = max(constants[f"BLOCK_{x}"] * constants[f"{x}_PARTS"] for x in ("KEY", "VALUE"))
    # A decode step's few rows fit, unless pairs are looked up.
    few = block_rows <= MIN_ROWS and not (constants["KEY_PAIRED"] or constants["VALUE_PAIRED"])
    return {
        "num_warps": 8 if widest * block_rows >= 128 * 16 and not few else 4,
        # What is looked up lies in the cache that a pipeline's buffers would take from.
        "num_stages": 1 if _looked_up(constants) else 2,
    }


def _looked_up(constants: dict[str, Any]) -> bool:
    """Whether pairs or states of a side are looked up in memory."""
    return any(constants[f"{x}_PAIRED"] or constants[f"{x}_HALF_BITS"] for x in ("KEY", "VALUE"))


def _levels(book: Tensor, bits: Bits, code: CodeName) -> Tensor:
    """What levels are read from: of a trellis in float16, where fewer lanes meet in a bank."""
    if code == "codebook":
        return book.contiguous()
    # A step asks for the same codewords in every layer, and a conversion is a launch. An operator's
    # bits are a float, which is another key of a cache than a whole number.
    bits = int(bits) if bits == int(bits) else bits
    shipped = codewords(PAGE_STATES, bits, book.device)
    same = shipped.data_ptr() == book.data_ptr()
    return _half_codewords(bits, book.device) if same else book.half()


@lru_cache(typed=True)
@outside_inference_mode
def _half_codewords(bits: Bits, device: torch.device) -> Tensor:
    return codewords(PAGE_STATES, bits, device).half()


@cache
def _programs(device: torch.device) -> int:
    if device.type == "cpu":
        return INTERPRETED_PROGRAMS
    properties = torch.cuda.get_device_properties(device)
    return PROGRAMS_PER_MULTIPROCESSOR * properties.multi_processor_count


def _splits(device: torch.device, programs: int, pages: int) -> int:
    """Parts of the history: as many as fill the device, of at least two pages each."""
    wanted = _programs(device) // max(programs, 1)
    return max(1, min(wanted, pages // 2))


def _check(
    name: str,
    codes: Tensor,
    scales: Tensor,
    book: Tensor,
    dim: int,
    bits: float,
    code: CodeName,
) -> None:
    _, _, size, levels = page_sizes(dim, bits, code)
    if codes.shape[2] != size or codes.stride(2) != 1 or scales.stride(2) != 1:
        raise ShapeError(
            f"pages.pool.{name}_codes: expected pages of {size} bytes at dim {dim} and {bits:g} "
            f"bits, and scales, contiguous in their last axis, got {list(codes.shape)}, strides "
            f"{list(codes.stride())} and {list(scales.stride())}"
        )
    if tuple(book.shape) != levels:
        raise ShapeError(
            f"{name}_centroids: expected {list(levels)} at {bits:g} bits, got {list(book.shape)}"
        )


def _mask_arguments(
    mask: Tensor | None, batch: int, heads: int, queries: int
) -> tuple[Tensor | None, tuple[int, int, int], int, float]:
    """The mask as the kernel reads it: strides (0 on broadcast axes), columns, what is never."""
    if mask is None:
        return None, (0, 0, 0), 0, 0.0
    additive = mask.dtype != torch.bool
    # Hosts write "never" as the lowest finite number of a narrow dtype, see dense.apply_mask.
    never = max(torch.finfo(mask.dtype).min / 2, torch.finfo(torch.float32).min) if additive else 0
    readable = mask if mask.stride(-1) == 1 else mask.contiguous()
    readable = readable.float() if mask.dtype is torch.float64 else readable
    return readable, mask_strides(readable, batch, heads, queries), mask.shape[-1], float(never)
