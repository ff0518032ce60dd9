"""The highest scores by the compiled extension (csrc/nearest/nearest.h)."""

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from sixfold.errors import ShapeError
from sixfold.kernels._groups import PageCode, address, page_code
from sixfold.kernels._native import compiled
from sixfold.kernels.types import VectorPages, VectorPart
from sixfold.packing import PAGE_TOKENS, row_bytes

_cpu = compiled()


def nearest(
    queries: Float32[Tensor, "nq coordinates"],
    weights: Float32[Tensor, " nq"],
    constants: Float32[Tensor, " nq"],
    pages: VectorPages,
    *,
    best: int,
) -> tuple[Float32[Tensor, "nq {best}"], Int64[Tensor, "nq {best}"]]:
    """See `sixfold.kernels.nearest.nearest`."""
    n_queries, count = len(queries), len(pages.allowed)
    dim = sum(part.coding.dim for part in pages.parts)
    queries, weights = queries.contiguous(), weights.contiguous()
    constants = constants.contiguous()
    scores = torch.empty(n_queries, best, dtype=torch.float32, device="cpu")
    slots = torch.empty(n_queries, best, dtype=torch.int64, device="cpu")
    offsets = pages.offsets
    if offsets is not None and offsets.dtype not in (torch.float16, torch.float32):
        raise ShapeError(f"offsets: expected float16 or float32, got {offsets.dtype}")
    _cpu.nearest(
        (
            [_part(part, count) for part in pages.parts],
            0
            if offsets is None
            else address("offsets", offsets, offsets.dtype, (count, PAGE_TOKENS)),
            offsets is not None and offsets.dtype is torch.float32,
            address("allowed", pages.allowed, torch.uint8, (count, PAGE_TOKENS // 8)),
            count,
        ),
        (
            address("queries", queries, torch.float32, (n_queries, dim)),
            address("weights", weights, torch.float32, (n_queries,)),
            address("constants", constants, torch.float32, (n_queries,)),
            n_queries,
        ),
        (scores.data_ptr(), slots.data_ptr(), best),
        torch.get_num_threads(),
    )
    return scores, slots


def _part(part: VectorPart, pages: int) -> tuple[PageCode, int, int]:
    page_bytes = PAGE_TOKENS * row_bytes(*part.coding.row)
    return (
        page_code(part.coding, "key"),
        address("codes", part.codes, torch.uint8, (pages, page_bytes)),
        address("scales", part.scales, torch.float16, (pages, PAGE_TOKENS)),
    )
