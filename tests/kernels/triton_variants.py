"""The attention kernels as a GPU would launch them, to be compiled where there is none.

Import it where TRITON_INTERPRET is not set: interpreted functions cannot be compiled.
"""

import itertools
from typing import Any

from sixfold.cache.policy import SPLITS
from sixfold.kernels._triton.attention import attend_pages, merge_ranges
from sixfold.kernels.attention.triton import (
    MIN_ROWS,
    launch_options,
    max_rows,
    page_constants,
)
from sixfold.kernels.types import CodeName
from sixfold.packing import Bits
from sixfold.trellis import PAGE_BITS
from tests.kernels.triton_variants_vectors import Variant

_PAGE_POINTERS = {
    "query": "*fp32",
    "key_codes": "*u8",
    "key_scales": "*fp16",
    "value_codes": "*u8",
    "value_scales": "*fp16",
    "slots": "*i64",
    "starts": "*i64",
    "lengths": "*i64",
    "first_token": "*i64",
    "key_book": "*fp32",
    "value_book": "*fp32",
    "offset": "*fp32",
    "mask": "*i1",
    "out": "*fp32",
    "lse": "*fp32",
}
_PAGE_NUMBERS = {
    "kv_heads": "i32",
    "n_pages": "i32",
    "n_rows": "i32",
    "n_queries": "i32",
    "origin": "i32",
    "slots_stride": "i32",
    "starts_stride": "i32",
    "lengths_stride": "i32",
    **{
        f"{side}_{axis}_stride": "i32"
        for side in ("key", "key_scale", "value", "value_scale")
        for axis in ("slot", "head")
    },
    "first_batch_stride": "i32",
    "first_query_stride": "i32",
    "mask_batch_stride": "i32",
    "mask_head_stride": "i32",
    "mask_query_stride": "i32",
    "mask_columns": "i32",
    "never": "fp32",
    "softcap": "fp32",
}

HEAD_DIMS = (64, 128, 256)
_EVEN: tuple[Bits, ...] = (2, 2.5, 3, 3.5, 4, 8)
WIDTHS = (*((bits, bits) for bits in _EVEN), *SPLITS["codebook"].values())
PATH_WIDTHS = (*((bits, bits) for bits in PAGE_BITS), *SPLITS["trellis"].values())


def attention(
    bits: tuple[Bits, Bits],
    dim: int,
    *,
    rows: int = MIN_ROWS,
    mask: str | None = None,
    softcap: bool = False,
    code: CodeName = "codebook",
) -> Variant:
    """`attend_pages` as it is launched for `rows` query rows a KV head; both sides of one code."""
    constants = _constants(bits, dim, code)
    options = launch_options(rows, constants)
    types = {**_PAGE_POINTERS, **_PAGE_NUMBERS}
    if code == "trellis":
        types |= {"key_book": "*fp16", "value_book": "*fp16"}
    constants |= {
        "BLOCK_ROWS": rows,
        "OFFSET": True,
        "MASK": mask is not None,
        "ADDITIVE": mask == "*bf16",
        "SOFTCAP": softcap,
        "PERMUTE": True,
    }
    if mask is None:
        del types["mask"]
        constants["mask"] = None
    else:
        types["mask"] = mask
    extra = f", mask {mask[1:]}" if mask else ""
    widths = " and ".join(f"{width:g}" for width in dict.fromkeys(bits))
    kind = "trellis " * (code == "trellis")
    name = f"attend_pages {kind}{widths} bits, dim {dim}, {rows} rows{extra}{', softcap' * softcap}"
    return Variant(name, attend_pages, types, constants, **options, tensor_cores=True, exact=False)


def _constants(bits: tuple[Bits, Bits], dim: int, code: CodeName) -> dict[str, Any]:
    return page_constants((dim, bits[0], code), (dim, bits[1], code))


def _most_rows(bits: tuple[Bits, Bits], dim: int, code: CodeName = "codebook") -> int:
    return max_rows(_constants(bits, dim, code))


def merge(dim: int) -> Variant:
    """`merge_ranges` for outputs of `dim` coordinates."""
    types = {
        "out": "*fp32",
        "lse": "*fp32",
        "merged": "*fp32",
        "merged_lse": "*fp32",
        "n_ranges": "i32",
        "n_rows": "i32",
    }
    constants = {"DIM": dim, "BLOCK": dim}
    return Variant(f"merge_ranges dim {dim}", merge_ranges, types, constants, 1, 3, exact=False)


def representative() -> list[Variant]:
    """One variant a way of working: what every change compiles."""
    return [
        attention((4, 4), 128),
        attention((3, 3), 64, mask="*i1"),
        attention((4, 3), 128, code="trellis"),
        merge(128),
    ]


def variants() -> list[Variant]:
    """Everything that is promised to compile: decoding, chunks, masks, the merge."""
    sizes = list(itertools.product(HEAD_DIMS, WIDTHS))
    decoding = [attention(bits, dim) for dim, bits in sizes]
    chunks = [
        attention(bits, dim, rows=_most_rows(bits, dim))
        for dim, bits in sizes
        if _most_rows(bits, dim) > MIN_ROWS
    ]
    paths = [
        attention(bits, dim, rows=rows, code="trellis")
        for dim in (32, *HEAD_DIMS)
        for bits in PATH_WIDTHS
        for rows in (MIN_ROWS, _most_rows(bits, dim, "trellis"))
    ]
    masked = [
        attention((4, 4), 128, mask="*i1"),
        attention((4, 4), 128, mask="*bf16", softcap=True),
        attention((4, 4), 128, rows=_most_rows((4, 4), 128), mask="*i1"),
    ]
    return [*decoding, *chunks, *paths, *masked, *map(merge, HEAD_DIMS)]
