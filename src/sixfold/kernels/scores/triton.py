"""Scores in Triton: tiles of codewords times tiles of queries on the tensor cores."""

import torch
import triton
import triton.language as tl
from jaxtyping import Float16, Float32, UInt8
from torch import Tensor

from sixfold.errors import ShapeError
from sixfold.kernels._triton import launch
from sixfold.kernels._triton.operators import operator
from sixfold.kernels._triton.pages import decoded_scale
from sixfold.kernels._triton.unpack import row_symbols
from sixfold.kernels.scores import reference
from sixfold.packing import Bits, n_symbols, plane_bytes, planes, row_bytes, symbol_bits


@triton.jit
def scores_kernel(
    queries,
    rows,
    scales,
    centroids,
    products,
    n_queries,
    n,
    SYMBOL: tl.constexpr,
    PAIRED: tl.constexpr,
    DIM: tl.constexpr,
    ROW: tl.constexpr,
    BYTES: tl.constexpr,
    PARTS: tl.constexpr,
    QUERIES: tl.constexpr,
    N: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """N codes against QUERIES queries of one batch a program; symbols a byte of the first plane.

    BYTES is what a row takes in its first plane, of PARTS symbols a byte: symbols part·BYTES + k
    share its byte k.
    """
    COUNT: tl.constexpr = (DIM + 1) // 2 if PAIRED else DIM
    batch = tl.program_id(2).to(tl.int64)
    vector = tl.program_id(0) * N + tl.arange(0, N)
    query = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    is_vector, is_query = vector < n, query < n_queries
    vector, query = batch * n + vector, batch * n_queries + query
    total = tl.zeros([QUERIES, N], tl.float32)
    for start in range(0, BYTES, COLUMNS):
        for part in tl.static_range(PARTS):
            byte = start + tl.arange(0, COLUMNS)
            index = part * BYTES + byte
            inside = (byte < BYTES) & (index < COUNT)
            symbol = row_symbols(rows, vector, is_vector, index, COUNT, SYMBOL)
            for half in tl.static_range(2 if PAIRED else 1):
                coordinate = index + half * COUNT
                mask = inside & (coordinate < DIM)
                place = 2 * symbol + half if PAIRED else symbol
                level = tl.load(centroids + place, mask=mask[None, :], other=0.0)
                asked = tl.load(
                    queries + query[:, None] * DIM + coordinate[None, :],
                    mask=is_query[:, None] & mask[None, :],
                    other=0.0,
                )
                # Three products of TensorFloat-32: as exact as float32.
                total = tl.dot(asked, tl.trans(level), total, input_precision="tf32x3")
    # Scales last: a NaN scale must not reach the other columns.
    scale = decoded_scale(tl.load(scales + vector, mask=is_vector, other=0.0))
    where = query[:, None] * n + (vector - batch * n)[None, :]
    tl.store(products + where, total * scale[None, :], mask=is_query[:, None] & is_vector[None, :])


def constants(dim: int, bits: Bits, n_queries: int) -> dict[str, int]:
    """What `scores_kernel` is compiled for."""
    symbol, count = symbol_bits(bits), n_symbols(dim, bits)
    first = planes(symbol)[0]
    size = plane_bytes(count, first)
    queries = min(64, max(16, triton.next_power_of_2(n_queries)))
    return {
        "DIM": dim,
        "ROW": row_bytes(count, symbol),
        "BYTES": size,
        "PARTS": 8 // first,
        "QUERIES": queries,
        "N": 1024 if launch.interpreted() else 64,
        # Wider tiles do not fit the registers: each operand is there in two parts, for `tf32x3`.
        "COLUMNS": min(32, max(16, triton.next_power_of_2(size))),
    }


def warps(constants: dict[str, int]) -> int:
    """Warps of a program."""
    return 8 if constants["QUERIES"] == 64 else 4


def scores(
    queries: Float32[Tensor, "*b nq dim"],
    rows: UInt8[Tensor, "*b n row_bytes"],
    scales: Float16[Tensor, "*b n"],
    centroids: Float32[Tensor, " levels *pair"],
    *,
    bits: Bits,
) -> Float32[Tensor, "*b nq n"]:
    """See `sixfold.kernels.scores.scores`."""
    if queries.requires_grad and torch.is_grad_enabled():
        return reference.scores(queries, rows, scales, centroids, bits=bits)
    products: Tensor = _scores(queries, rows, scales, centroids, float(bits))
    return products


def _products_shape(
    queries: Tensor, rows: Tensor, scales: Tensor, centroids: Tensor, bits: float
) -> Tensor:
    return queries.new_empty((*queries.shape[:-1], scales.shape[-1]), dtype=torch.float32)


@operator(
    "scores(Tensor queries, Tensor rows, Tensor scales, Tensor centroids, float bits) -> Tensor",
    _products_shape,
)
def _scores(
    queries: Tensor, rows: Tensor, scales: Tensor, centroids: Tensor, bits: float
) -> Tensor:
    *batch, n_queries, dim = queries.shape
    count, n = torch.Size(batch).numel(), scales.shape[-1]
    compiled = constants(dim, bits, n_queries) | launch.codebook(dim, bits, centroids)
    expected = (*batch, n, compiled["ROW"])
    if rows.shape != expected or scales.shape != expected[:-1]:
        raise ShapeError(
            f"rows: expected {list(expected)} for queries {list(queries.shape)}, got "
            f"{list(rows.shape)} and scales {list(scales.shape)}"
        )
    products = queries.new_empty((*batch, n_queries, n), dtype=torch.float32)
    if products.numel():
        grid = (triton.cdiv(n, compiled["N"]), triton.cdiv(n_queries, compiled["QUERIES"]), count)
        scores_kernel[grid](
            queries.contiguous(),
            rows.contiguous(),
            scales.contiguous(),
            centroids.contiguous(),
            products,
            n_queries,
            n,
            **compiled,
            num_warps=warps(compiled),
            num_stages=2,
            enable_fp_fusion=True,
        )
    return products
