"""The vectors of some pages that score highest with each query."""

from jaxtyping import Float32, Int64
from torch import Tensor

from sixfold.errors import ShapeError
from sixfold.kernels._dispatch import implementation
from sixfold.kernels._operation import operation, plain_dense
from sixfold.kernels.types import VectorPages

__all__ = ["nearest"]

# As csrc/nearest/nearest.h has it.
MOST_PARTS = 8


@operation
def nearest(
    queries: Float32[Tensor, "nq coordinates"],
    weights: Float32[Tensor, " nq"],
    constants: Float32[Tensor, " nq"],
    pages: VectorPages,
    *,
    best: int,
) -> tuple[Float32[Tensor, "nq {best}"], Int64[Tensor, "nq {best}"]]:
    """The highest scores of each query: Σ scale·⟨R·query, codeword⟩ + weight·offset + constant.

    The sum is over the parts of the vectors.

    Args:
        queries: The parts' coordinates one after another, each already rotated (`rotate` with the
            turns and factor of its coding); finite.
        weights: What each query multiplies offsets with.
        constants: Added to all scores of a query.
        pages: What is searched, in the key layout.
        best: How many are wanted of each query.

    Returns:
        Scores, descending, and slots (64·page + place in it). Of equal scores the lower slot comes
        first. Where fewer vectors are allowed, the rest are -inf and -1. What a query finds depends
        neither on other queries nor on threads.

    Raises:
        ShapeError: Tensors do not fit each other.
    """
    each = queries.shape[:1]
    dim = sum(part.coding.dim for part in pages.parts)
    if not 0 < len(pages.parts) <= MOST_PARTS:
        raise ShapeError(f"expected 1 to {MOST_PARTS} parts of vectors, got {len(pages.parts)}")
    if queries.shape[1:] != (dim,) or weights.shape != each or constants.shape != each:
        raise ShapeError(
            f"expected queries [queries, {dim}], and a weight and a constant for each, got "
            f"{list(queries.shape)}, {list(weights.shape)} and {list(constants.shape)}."
        )
    queries, weights = plain_dense("queries", queries), plain_dense("weights", weights)
    constants = plain_dense("constants", constants)
    kernel = implementation("nearest", pages.allowed.device)
    found: tuple[Tensor, Tensor] = kernel.nearest(queries, weights, constants, pages, best=best)
    return found
