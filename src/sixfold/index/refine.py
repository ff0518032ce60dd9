"""What was found by codes, ranked again by the vectors themselves."""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float32, Float64
from torch import Tensor

from sixfold.arguments import shown
from sixfold.errors import OutOfRangeError, SixfoldError
from sixfold.index.ids import Ids
from sixfold.index.metric import Metric, prepared
from sixfold.index.rows import Rows

Originals: TypeAlias = Any
"""An array whose row i is the vector of id i, or a function from ids to their vectors."""

# Candidates of each vector that is wanted, and some: of 30,688 embeddings they held 99.9 % or more
# of the ten nearest ones (docs/vector_search.md).
CANDIDATES = {1: 16, 2: 4, 3: 3, 4: 2, 8: 2}
MORE = 32
# Of the vectors that are looked at at a time.
NUMBERS = 2**22


def candidates(k: int, bits: int) -> int:
    """How many are looked at again."""
    return CANDIDATES[bits] * k + MORE


def source(originals: Originals, dim: int) -> Callable[[Ids], Tensor]:
    """A function from ids to their vectors, float32, checked.

    Raises:
        SixfoldError: It is no array, and cannot be called.
        ShapeError: Its rows are not of `dim` coordinates.
    """
    if callable(originals):
        # A copy: what becomes of it is the function's business.
        return lambda ids: _given(originals(ids.copy()), ids, dim)
    rows = Rows("refine", originals, dim)

    def read(ids: Ids) -> Tensor:
        if ids.dtype == object:
            raise SixfoldError(
                "refine: ids of this index are strings: pass a function from ids to their vectors"
            )
        outside = ids[(ids < 0) | (ids >= len(rows))]
        if len(outside):
            raise OutOfRangeError(
                f"refine: expected a row for each id, got {len(rows)} rows and id {outside[0]}: "
                "pass a function from ids to their vectors"
            )
        return rows.at(ids)

    return read


def _given(vectors: Any, ids: Ids, dim: int) -> Tensor:
    rows = Rows("refine", vectors, dim)
    if len(rows) != len(ids):
        raise SixfoldError(
            f"refine: expected a vector for each of {len(ids)} ids, got {shown(len(rows))}"
        )
    return rows.at(np.arange(len(ids)))


def refined(
    queries: Float32[Tensor, "nq dim"],
    scores: np.ndarray,
    ids: np.ndarray,
    k: int,
    read: Callable[[Ids], Tensor],
    metric: Metric,
) -> tuple[np.ndarray, np.ndarray]:
    """The `k` best by exact scores, of those found; where scores are -inf there was nothing."""
    step = max(1, NUMBERS // max(scores.shape[1] * queries.shape[1], 1))
    found = [
        _ranked(own, scores[start : start + step], ids[start : start + step], k, read, metric)
        for start, own in zip(
            range(0, max(len(queries), 1), step), queries.split(step), strict=True
        )
    ]
    return np.concatenate([x for x, _ in found]), np.concatenate([x for _, x in found])


def _ranked(
    queries: Float32[Tensor, "nq dim"],
    scores: np.ndarray,
    ids: np.ndarray,
    k: int,
    read: Callable[[Ids], Tensor],
    metric: Metric,
) -> tuple[np.ndarray, np.ndarray]:
    there = scores > -np.inf
    asked, exact = prepared(queries.double(), metric), np.full(ids.shape, -np.inf)
    if there.any():
        every, places = np.unique(ids[there], return_inverse=True)
        own = prepared(read(every).double(), metric)
        pairs = (torch.from_numpy(np.nonzero(there)[0]), torch.from_numpy(places))
        step = max(1, NUMBERS // own.shape[1])
        each = zip(*(x.split(step) for x in pairs), strict=True)
        found = [_scores(asked[query], own[place], metric) for query, place in each]
        exact[there] = torch.cat(found).numpy()
    # Of equal ones those that were found first come first.
    order = np.argsort(-exact, 1, kind="stable")[:, :k]
    best = np.take_along_axis(exact, order, 1).astype(np.float32)
    return best, np.take_along_axis(ids, order, 1)


def _scores(
    queries: Float64[Tensor, "n dim"], vectors: Float64[Tensor, "n dim"], metric: Metric
) -> Float64[Tensor, " n"]:
    if metric == "l2":
        return -(queries - vectors).square().sum(1)
    # Row by row, so that sums do not depend on other queries.
    return (queries * vectors).sum(1)
