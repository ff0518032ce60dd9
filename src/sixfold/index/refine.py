"""What was found by codes, ranked again by the vectors themselves."""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float32, Float64
from torch import Tensor

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


def reader(originals: Originals, dim: int) -> Callable[[Ids], Tensor]:
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
        raise SixfoldError(f"refine: expected a vector for each of {len(ids)} ids, got {len(rows)}")
    return rows.at(slice(None))


def refined(
    queries: Float32[Tensor, "nq dim"],
    scores: np.ndarray,
    ids: np.ndarray,
    k: int,
    read: Callable[[Ids], Tensor],
    metric: Metric,
) -> tuple[np.ndarray, np.ndarray]:
    """The `k` best by exact scores, of those found; where scores are -inf there was nothing."""
    asked, exact = prepared(queries.double(), metric), np.full(ids.shape, -np.inf)
    step = max(1, NUMBERS // (ids.shape[1] * queries.shape[1]))
    for start in range(0, len(ids), step):
        some = slice(start, start + step)
        there = scores[some] > -np.inf
        if there.any():
            exact[some][there] = _exact(asked[some], ids[some], there, read, metric)
    # Of equal ones those that were found first come first.
    order = np.argsort(-exact, 1, kind="stable")[:, :k]
    best = np.take_along_axis(exact, order, 1).astype(np.float32)
    return best, np.take_along_axis(ids, order, 1)


def _exact(
    queries: Float64[Tensor, "nq dim"],
    ids: np.ndarray,
    there: np.ndarray,
    read: Callable[[Ids], Tensor],
    metric: Metric,
) -> np.ndarray:
    """Scores of the pairs that are there, in order; each vector is read once."""
    every, places = np.unique(ids[there], return_inverse=True)
    vectors = prepared(read(every).double(), metric)
    pairs = torch.from_numpy(np.nonzero(there)[0]), torch.from_numpy(places)
    # Of one query there may be any number.
    each = zip(*(x.split(max(1, NUMBERS // vectors.shape[1])) for x in pairs), strict=True)
    found = [_scores(queries[query], vectors[place], metric) for query, place in each]
    return torch.cat(found).numpy()


def _scores(
    queries: Float64[Tensor, "n dim"], vectors: Float64[Tensor, "n dim"], metric: Metric
) -> Float64[Tensor, " n"]:
    if metric == "l2":
        return -(queries - vectors).square().sum(1)
    # Row by row, so that sums do not depend on other queries.
    return (queries * vectors).sum(1)
