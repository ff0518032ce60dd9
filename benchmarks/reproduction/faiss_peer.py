"""Product quantization, RaBitQ and faiss's own TurboQuant codes, where faiss is installed."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

try:
    import faiss
except ImportError:
    faiss = None

FAISS: Any = faiss
"""The module, or None."""

TRAINING_VECTORS, TRAINING_STEPS = 5120, 10
"""Of the product quantizer whose recall is measured: its k-means takes minutes otherwise."""


def version() -> str | None:
    """Of faiss, if it is installed."""
    return None if FAISS is None else str(FAISS.__version__)


def use_threads(count: int) -> None:
    """Let faiss use `count` threads, if it is installed."""
    if FAISS is not None:
        FAISS.omp_set_num_threads(count)


def indexes(dim: int, bits: int, trained: bool) -> dict[str, Callable[[], Any]]:
    """Makers of empty indexes for inner products at `bits` bits a coordinate, by name.

    Args:
        dim: Coordinates a vector.
        bits: 2 or 4.
        trained: Also those that learn from the vectors, for minutes.
    """
    if FAISS is None:
        return {}
    made: dict[str, Callable[[], Any]] = {
        "faiss RaBitQ": lambda: FAISS.IndexRaBitQ(dim, FAISS.METRIC_INNER_PRODUCT, bits),
        "faiss TurboQuant": lambda: _scalar(dim, f"QT_{bits}bit_tqmse"),
    }
    # Both expect vectors that are rotated already.
    rotated = {name: _rotated(dim, make) for name, make in made.items()}
    return {**rotated, "faiss PQ": lambda: product(dim, bits)} if trained else rotated


def product(dim: int, bits: int) -> Any:
    """Product quantizer with 256 centroids for every 8 bits, as the paper has it."""
    index = FAISS.IndexPQ(dim, dim * bits // 8, 8, FAISS.METRIC_INNER_PRODUCT)
    index.pq.cp.max_points_per_centroid = TRAINING_VECTORS // 256
    index.pq.cp.min_points_per_centroid = TRAINING_VECTORS // 256
    index.pq.cp.niter = TRAINING_STEPS
    return index


def search(
    index: Any, queries: Float[Tensor, "queries dim"], count: int
) -> Int[Tensor, "queries count"]:
    """The vectors of largest estimated inner product."""
    _, found = index.search(queries.numpy(), count)
    return torch.from_numpy(found)


def _scalar(dim: int, kind: str) -> Any:
    codes = getattr(FAISS.ScalarQuantizer, kind)
    return FAISS.IndexScalarQuantizer(dim, codes, FAISS.METRIC_INNER_PRODUCT)


def _rotated(dim: int, make: Callable[[], Any]) -> Callable[[], Any]:
    def index() -> Any:
        rotation = FAISS.RandomRotationMatrix(dim, dim)
        rotation.init(0)
        return FAISS.IndexPreTransform(rotation, make())

    return index
