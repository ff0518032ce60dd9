"""The vectors that an index is calibrated with, checked."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from sixfold.errors import SixfoldError
from sixfold.index.metric import Metric, prepared
from sixfold.index.rows import Rows

# Vectors, from all over those that are given, that estimates are made from.
SAMPLE = 8192
# Fewer say nothing of directions.
LEAST_SAMPLE = 256
# Of a mean, in units of what vectors differ by: float32 has seven digits.
FARTHEST = 1e5


def calibration_sample(given: Any, dim: int, metric: Metric) -> Float32[Tensor, "n dim"]:
    """Different vectors, as `metric.prepared` makes them.

    Raises:
        ShapeError: They are not [n, dim].
        SixfoldError: They are too few, not finite, or much farther from 0 than from each other.
    """
    source = Rows("sample", given, dim)
    if len(source) < LEAST_SAMPLE:
        raise SixfoldError(
            f"sample: expected at least {LEAST_SAMPLE} vectors, got {len(source)}: without "
            "calibrate an index needs none"
        )
    source.check_finite(metric)
    rows = _different(prepared(source.sample(SAMPLE), metric))
    if len(rows) < LEAST_SAMPLE:
        raise SixfoldError(
            f"sample: expected at least {LEAST_SAMPLE} different vectors, got {len(rows)}"
        )
    _check_near(rows)
    return rows


def _different(x: Float32[Tensor, "n dim"]) -> Float32[Tensor, "some dim"]:
    """The first of equal vectors, in order."""
    first = np.unique(x.numpy(), axis=0, return_index=True)[1]
    return x[torch.from_numpy(np.sort(first))]


def _check_near(x: Float32[Tensor, "n dim"]) -> None:
    """Refuse vectors of which a basis of float32 would leave little but what they share.

    Raises:
        SixfoldError: They are such.
    """
    mean = x.double().mean(0)
    spread = float((x - mean).square().mean().sqrt())
    if float(mean.abs().max()) > FARTHEST * spread:
        raise SixfoldError(
            "sample: a coordinate's mean is more than 100,000 times as large as vectors differ: "
            "subtract the mean of the vectors, from queries too, or drop that coordinate"
        )
