"""What codes find, ranked again by the vectors themselves."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sixfold
from sixfold.errors import OutOfRangeError, ShapeError, SixfoldError
from tests.memory import peak_allocation
from tests.unit.test_index import METRICS, clustered, exact_scores, recall

pytestmark = pytest.mark.usefixtures("unhooked")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_nearest_are_found_with_their_scores(bits: int, metric: Any) -> None:
    x, queries = clustered(3000), clustered(50, seed=1)
    index = sixfold.Index(64, bits, metric)
    index.add(x)
    exact = exact_scores(queries, x, metric)
    scores, ids = index.search(queries, refine=x)
    best = np.argsort(-exact, 1)[:, :10]
    # Errors of 64 coordinates are larger than those that candidates are counted for.
    assert recall(ids, best) >= (0.97 if bits == 2 else 0.995)
    assert recall(ids, best) > recall(index.search(queries).ids, best)
    np.testing.assert_allclose(scores, np.take_along_axis(exact, ids, 1), rtol=1e-5, atol=1e-5)
    assert (np.diff(scores, axis=1) <= 0).all()
    alone = index.search(queries[3], refine=x)
    assert np.array_equal(alone.scores, scores[3])
    assert np.array_equal(alone.ids, ids[3])


def test_wherever_the_vectors_are(tmp_path: Path) -> None:
    x, queries = clustered(500), clustered(5, seed=1)
    index = sixfold.Index(64, 2)
    index.add(x)
    np.save(tmp_path / "x.npy", x)
    expected = index.search(queries, refine=x)
    asked = []

    def stored(ids: np.ndarray) -> Any:
        asked.append(ids)
        return x[ids].tolist()

    for given in (np.load(tmp_path / "x.npy", mmap_mode="r"), torch.from_numpy(x), stored):
        for found, same in zip(index.search(queries, refine=given), expected, strict=True):
            assert np.array_equal(found, same)
    # Each of the candidates once, and no others.
    (ids,) = asked
    assert len(ids) == len(set(ids.tolist())) < 500


def test_ids_that_are_no_rows() -> None:
    x = clustered(100)
    index = sixfold.Index(64)
    index.add(x, [f"n{i}" for i in range(100)])
    with pytest.raises(SixfoldError, match="ids of this index are strings"):
        index.search(x[:2], refine=x)
    scores, ids = index.search(x[:2], 3, refine=lambda ids: x[[int(id[1:]) for id in ids]])
    assert ids[:, 0].tolist() == ["n0", "n1"]
    np.testing.assert_allclose(scores[:, 0], 1, rtol=1e-6)
    index = sixfold.Index(64)
    index.add(x, np.arange(100) + 50)
    with pytest.raises(OutOfRangeError, match="id 1"):
        index.search(x[-1:], refine=x)


def test_fewer_than_are_wanted() -> None:
    x = clustered(6)
    index = sixfold.Index(64)
    assert index.search(x, 3, refine=x).ids.tolist() == [[-1] * 3] * 6
    index.add(x)
    scores, ids = index.search(x[0], 9, refine=x)
    assert ids[6:].tolist() == [-1] * 3
    assert (scores[6:] == -np.inf).all()
    assert sorted(ids[:6].tolist()) == list(range(6))
    assert index.search(x[0], 9, filter=[4], refine=x).ids.tolist() == [4] + [-1] * 8
    assert index.search(x[:0], 3, refine=x).ids.shape == (0, 3)


def test_many_more_than_there_are() -> None:
    """What is not there is neither read nor scored."""
    x = clustered(300)
    index = sixfold.Index(64, 1)
    index.add(x)
    peak = peak_allocation(lambda: index.search(x[:2], 2**18, refine=x))
    assert peak < 60e6
    scores, ids = index.search(x[:2], 2**18, refine=x)
    assert ids[0, 0] == 0
    assert (np.diff(scores[0, :300]) <= 0).all()
    assert sorted(ids[0, :300].tolist()) == list(range(300))
    assert (ids[:, 300:] == -1).all()


def test_what_is_no_source_of_vectors() -> None:
    x = clustered(100)
    index = sixfold.Index(64)
    index.add(x)
    for wrong, kind in (
        (x[:, :-1], ShapeError),
        ("no", SixfoldError),
        (5, ShapeError),
        (lambda ids: x[:3], SixfoldError),
        (lambda ids: ids.resize(3, refcheck=False), SixfoldError),
        (lambda ids: np.full((len(ids), 64), np.nan), SixfoldError),
    ):
        with pytest.raises(kind, match="refine"):
            index.search(x[:2], refine=wrong)
