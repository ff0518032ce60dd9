"""Algorithms 1 and 2: squared error, inner-product error and bias of unit vectors."""

import math
from functools import lru_cache
from typing import Any

from sixfold.codebooks import expected_mse
from sixfold.eval.distortion import (
    PAPER_INNER_PRODUCT,
    PAPER_MSE,
    Distortion,
    Method,
    expected_distortion,
    measure_distortion,
)

DIMS = (128, 1536)
LIMIT = 1_000_000
VECTORS = 4096
WIDTHS: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
NARROW: tuple[int, ...] = (1, 2, 3, 4, 5)
SKETCHES: tuple[Method, ...] = ("prod-gaussian", "prod")
ALL: tuple[Method, ...] = ("norm", "optimal", "unbiased", *SKETCHES)

_Case = tuple[int, float, Method]


def mse(vectors: int = VECTORS) -> dict[str, Any]:
    """Algorithm 1: what is lost of a vector, beside the exact value and the paper's bounds."""
    found = measure_distortion(DIMS, WIDTHS, methods=["norm"], vectors=vectors)
    rows = [
        {
            "dim": one.dim,
            "bits": bits,
            "paper": PAPER_MSE.get(bits),
            "exact": one.expected_mse,
            "limit": expected_mse(LIMIT, bits),
            "measured": one.mse,
            "lower_bound": one.lower_bound,
            "upper_bound": one.mse_bound,
        }
        for one, bits in zip(found, WIDTHS * len(DIMS), strict=True)
    ]
    return {"vectors": vectors, "rows": rows}


def prod(vectors: int = VECTORS) -> dict[str, Any]:
    """Algorithm 2: dim·E(error of an inner product)², with the paper's sketch and a better one."""
    found = _measured(vectors)
    rows = []
    for dim in DIMS:
        for bits in NARROW:
            gaussian, orthogonal = (found[dim, bits, method] for method in SKETCHES)
            rows.append(
                {
                    "dim": dim,
                    "bits": bits,
                    "paper": PAPER_INNER_PRODUCT.get(bits),
                    # In the limit of many dimensions, where the paper states it.
                    "exact": math.pi / 2 * (1 if bits == 1 else expected_mse(LIMIT, bits - 1)),
                    # The mean over queries of every direction: E|decoded - x|².
                    "gaussian": gaussian.mse,
                    "gaussian_exact": expected_distortion("prod-gaussian", dim, bits),
                    "orthogonal_exact": expected_distortion("prod", dim, bits),
                    "orthogonal": orthogonal.mse,
                    "lower_bound": gaussian.lower_bound,
                    "upper_bound": gaussian.inner_product_bound,
                }
            )
    return {"vectors": vectors, "rows": rows}


def bias(vectors: int = VECTORS) -> dict[str, Any]:
    """Mean estimate over mean inner product: 1 without bias."""
    found = _measured(vectors)
    rows = []
    for dim in DIMS:
        for bits in NARROW:
            ours = {method: found[dim, bits, method] for method in ALL if method != "optimal"}
            rows.append(
                {
                    "dim": dim,
                    "bits": bits,
                    "paper": 2 / math.pi if bits == 1 else None,
                    "exact": 1 - expected_mse(dim, bits),
                    "measured": {name: 1 + one.inner_product_bias for name, one in ours.items()},
                    "standard_error": {name: _error(one, vectors) for name, one in ours.items()},
                }
            )
    return {"vectors": vectors, "rows": rows}


def crossover(vectors: int = VECTORS) -> dict[str, Any]:
    """dim·E(error of an inner product)² of every variant at the same bits a coordinate."""
    found = _measured(vectors)
    rows = [
        {
            "dim": dim,
            "bits": bits,
            "error": {method: found[dim, bits, method].inner_product_error for method in ALL},
            "bits_per_value": {method: found[dim, bits, method].bits_per_value for method in ALL},
        }
        for dim in DIMS
        for bits in NARROW
    ]
    return {"vectors": vectors, "rows": rows}


@lru_cache
def _measured(vectors: int) -> dict[_Case, Distortion]:
    found = measure_distortion(DIMS, NARROW, methods=ALL, vectors=vectors)
    return {(one.dim, one.bits, one.method): one for one in found}


def _error(one: Distortion, vectors: int) -> float:
    """Standard error of the mean estimate, over the mean inner product of one half."""
    return math.sqrt(one.inner_product_error / one.dim / vectors) / 0.5
