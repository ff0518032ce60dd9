"""An index whose codes were fitted to a sample: what that is worth, and what it must not cost."""

import copy
import warnings
from typing import Any

import numpy as np
import pytest

from sixfold.errors import ShapeError, SixfoldError
from sixfold.index import Index
from sixfold.index.code import VectorCode
from tests.processes import printed
from tests.unit.test_index import METRICS, exact_scores, recall

pytestmark = pytest.mark.usefixtures("unhooked")

DIM = 128


def basis(dim: int, seed: int = 0) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(dim, dim)))[0]


def vectors(n: int, seed: int, dim: int = DIM, axes: int = 0, power: float = 1.0) -> np.ndarray:
    """Vectors whose variance falls off along axes of their own, with a mean."""
    scale = np.arange(1, dim + 1) ** -power
    x = np.random.default_rng(seed).normal(size=(n, dim)) * scale
    return (x @ basis(dim, axes) + 0.1).astype(np.float32)


def calibrated(bits: int, metric: Any = "cosine", rows: int = 2048, **kind: Any) -> Index:
    index = Index(kind.get("dim", DIM), bits, metric)
    index.calibrate(vectors(rows, 99, **kind))
    return index


def nearest(queries: np.ndarray, x: np.ndarray, metric: str) -> np.ndarray:
    return np.argsort(-exact_scores(queries, x, metric), 1, kind="stable")[:, :10]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("bits", "gain"), [(1, 0.1), (2, 0.03), (4, 0.01)])
def test_more_is_found_with_as_many_bytes(bits: int, gain: float, metric: Any) -> None:
    x, queries = vectors(4000, 1), vectors(60, 2)
    plain, index = Index(DIM, bits, metric), calibrated(bits, metric)
    assert index.calibrated
    assert not plain.calibrated
    for one in (plain, index):
        one.add(x)
    code = index._state.code
    assert len(code.groups) > 1
    assert index.nbytes - code.nbytes <= plain.nbytes
    best = nearest(queries, x, metric)
    found = [recall(one.search(queries).ids, best) for one in (plain, index)]
    assert found[1] > found[0] + gain
    exact = exact_scores(queries, x, metric)
    every = index.search(queries, k=len(x))
    error = every.scores - np.take_along_axis(exact, every.ids, 1)
    assert abs(error.mean()) < 0.01 * exact.std()
    lost = [np.square(one.decode(one.ids) - plain_of(x, metric)).sum() for one in (plain, index)]
    assert lost[1] < 0.8 * lost[0]


def plain_of(x: np.ndarray, metric: str) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True) if metric == "cosine" else x


@pytest.mark.parametrize("power", [0.0, 0.3])
@pytest.mark.parametrize("rows", [256, 1000])
def test_of_few_vectors_nothing_is_learned(rows: int, power: float) -> None:
    """Their own axes say much that is not so of others."""
    x, queries = vectors(3000, 1, 384, power=power), vectors(60, 2, 384, power=power)
    best = nearest(queries, x, "cosine")
    plain, index = Index(384, 2), calibrated(2, rows=rows, dim=384, power=power)
    found = []
    for one in (plain, index):
        one.add(x)
        found.append(recall(one.search(queries).ids, best))
    assert found[1] > found[0] - 0.02


@pytest.mark.parametrize("dim", [1, 2, 20, 33, 100, 700])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_any_dimension(dim: int, bits: int) -> None:
    index = calibrated(bits, "l2", 400, dim=dim)
    x = vectors(200, 3, dim)
    index.add(x)
    assert sum(width for width, _ in index._state.code.groups) == dim
    assert sum(width * b for width, b in index._state.code.groups) <= dim * bits
    if bits == 8 and dim > 1:
        best = exact_scores(x, x, "l2").argmax(1)
        assert (index.search(x, 1).ids[:, 0] == best).mean() > 0.95
    assert np.isfinite(index.decode(index.ids)).all()


@pytest.mark.parametrize("queries", [1, 7, 130])
def test_a_query_finds_the_same_alone(queries: int) -> None:
    index = calibrated(3)
    index.add(vectors(2500, 1))
    asked = vectors(queries, 2)
    scores, ids = index.search(asked, 20)
    for q in range(0, queries, 3):
        alone = index.search(asked[q], 20)
        assert np.array_equal(alone.scores, scores[q])
        assert np.array_equal(alone.ids, ids[q])


def test_the_reference_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    index, queries = calibrated(2), vectors(20, 2)
    index.add(vectors(1500, 1))
    found = index.search(queries)
    monkeypatch.setenv("SIXFOLD_BACKEND", "reference")
    plain = index.search(queries)
    assert recall(plain.ids, found.ids) > 0.95
    np.testing.assert_allclose(plain.scores, found.scores, atol=0.02)


def test_vectors_come_and_go(tmp_path: Any) -> None:
    """Whatever was done, scores are those of the vectors held."""
    index, held = calibrated(4, "ip"), {}
    random = np.random.default_rng(5)
    for turn in range(30):
        count = int(random.integers(1, 400))
        ids = random.choice(3000, count, replace=False)
        if turn % 3 == 2:
            gone = [int(i) for i in ids if int(i) in held]
            index.remove(gone)
            for i in gone:
                del held[i]
        else:
            x = vectors(count, turn)
            index.add(x, ids, upsert=True)
            held |= dict(zip(ids.tolist(), x, strict=True))
        if turn % 7 == 6:
            index.save(tmp_path / "index")
            index = Index.load(tmp_path / "index")
        if turn % 5 == 4:
            index = copy.deepcopy(index)
        assert index.calibrated
    x = np.array([held[i] for i in index.ids.tolist()])
    assert len(index) == len(held) == len(x)
    queries = vectors(20, 77)
    exact = exact_scores(queries, x, "ip")
    every = index.search(queries, len(held))
    place = {id: row for row, id in enumerate(index.ids.tolist())}
    rows = np.vectorize(place.__getitem__)(every.ids)
    error = every.scores - np.take_along_axis(exact, rows, 1)
    assert np.sqrt(np.square(error).mean()) < 0.06 * exact.std()


def test_vectors_that_the_sample_does_not_speak_for() -> None:
    index = calibrated(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        index.add(vectors(1000, 4))
    with pytest.warns(UserWarning, match="vary in other directions than the sample"):
        index.add(vectors(1000, 5, axes=8))
    # Nor do they if they come one by one.
    index = calibrated(2)
    x = vectors(300, 5, axes=8)
    index.add(x[:200])
    index.remove(index.ids)
    # What has come before belongs to the sample before.
    index.calibrate(vectors(2048, 99))
    for i in range(255):
        index.add(x[i])
    with pytest.warns(UserWarning, match="vary in other directions than the sample"):
        index.add(x[255])


def test_the_warning_is_about_a_line_of_the_caller() -> None:
    code = """
import warnings
from tests.unit.test_index_calibrated import calibrated, vectors
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    calibrated(2).add(vectors(1000, 5, axes=8))
print(*{x.filename for x in caught})
"""
    assert printed(code) == ["<string>"]


def test_when_and_with_what() -> None:
    index = Index(DIM, 2)
    for wrong, kind in (
        (vectors(255, 0), SixfoldError),
        (vectors(500, 0)[:, :-1], ShapeError),
        (np.full((500, DIM), np.nan), SixfoldError),
        ("no", SixfoldError),
    ):
        with pytest.raises(kind, match="sample"):
            index.calibrate(wrong)
        assert not index.calibrated
    index.calibrate(vectors(300, 0))
    index.calibrate(vectors(400, 0))
    assert len(index) == 0
    index.add(vectors(10, 1))
    with pytest.raises(SixfoldError, match="holds 10 vectors"):
        index.calibrate(vectors(500, 0))
    index.remove(index.ids)
    with pytest.raises(SixfoldError, match="256 different vectors, got 2"):
        index.calibrate(np.repeat(np.eye(2, DIM), 200, 0))
    far = vectors(500, 0) + 1e6
    for one in (index, Index(DIM, 2, "l2")):
        with pytest.raises(SixfoldError, match="subtract the mean"):
            one.calibrate(far)
    # One that is elsewhere, and many that are nearly the same.
    near = 1 + 1e-5 * vectors(500, 0)
    near[0] = vectors(1, 3)
    one = Index(DIM, 2, "l2")
    one.calibrate(near)
    one.add(near)
    assert np.isfinite(one.search(near).scores).all()
    with pytest.raises(SixfoldError, match="8192 coordinates"):
        Index(8193).calibrate(np.ones((256, 8193), np.float16))


@pytest.mark.parametrize("order", ["beside", "behind", "shuffled"])
@pytest.mark.parametrize("twin", [1.0, -1.0, 3.0, None])
@pytest.mark.parametrize("bits", [1, 2])
def test_vectors_that_come_in_pairs_teach_no_more(
    bits: int, twin: float | None, order: str
) -> None:
    """Each with one like it, as overlapping pieces of a text are, or opposite."""
    random = np.random.default_rng(0)
    half = random.normal(size=(300, 256))
    other = half + 0.2 * random.normal(size=half.shape) if twin is None else twin * half
    places = {
        "beside": np.arange(600).reshape(2, 300).T.ravel(),
        "behind": np.arange(600),
        "shuffled": random.permutation(600),
    }
    sample = np.concatenate([half, other])[places[order]]
    if twin == 1.0:
        sample += 1e-6 * random.normal(size=sample.shape)
    x, queries = random.normal(size=(3000, 256)), random.normal(size=(40, 256))
    plain, index = Index(256, bits), Index(256, bits)
    index.calibrate(sample)
    for one in (plain, index):
        one.add(x)
    best = nearest(queries, x, "cosine")
    found = [recall(one.search(queries).ids, best) for one in (plain, index)]
    assert found[1] > found[0] - 0.03


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_few_long_vectors_do_not_decide(bits: int) -> None:
    """Errors are relative to a vector's length; most of the energy is in one of a hundred."""

    def drawn(n: int, seed: int) -> np.ndarray:
        random = np.random.default_rng(seed)
        x = random.normal(size=(n, 256))
        long = random.random(n) < 0.01
        x[long] = 0
        x[long, :16] = 60 * random.normal(size=(long.sum(), 16))
        return x

    x, queries = drawn(4000, 1), np.random.default_rng(2).normal(size=(100, 256))
    plain, index = Index(256, bits, "l2"), Index(256, bits, "l2")
    index.calibrate(drawn(2048, 3))
    for one in (plain, index):
        one.add(x)
    best = nearest(queries, x, "l2")
    found = [recall(one.search(queries).ids, best) for one in (plain, index)]
    assert found[1] > found[0] - 0.04


def test_a_query_with_no_part_in_the_sample_finds_the_same_alone() -> None:
    """What is nothing but rounding must not depend on what comes along either."""
    turn = basis(DIM, 3)
    x = np.random.default_rng(0).normal(size=(1000, DIM // 2)) @ turn[: DIM // 2]
    queries = np.random.default_rng(1).normal(size=(40, DIM // 2)) @ turn[DIM // 2 :]
    index = Index(DIM, 4, "ip")
    index.calibrate(x)
    index.add(x)
    together = index.search(queries)
    for q in range(0, 40, 5):
        alone = index.search(queries[q])
        assert np.array_equal(alone.ids, together.ids[q])
        assert np.array_equal(alone.scores, together.scores[q])


def test_large_numbers_are_written_and_read(tmp_path: Any) -> None:
    random = np.random.default_rng(0)
    x = (1 + 0.01 * random.normal(size=(1500, 100))) * 0.9e16
    index = Index(100, 2, "ip")
    index.calibrate(x)
    index.add(x)
    index.save(tmp_path / "index")
    assert len(Index.load(tmp_path / "index")) == 1500


def test_queries_and_vectors_agree_while_an_index_is_fitted_anew() -> None:
    """Codes belong to what is held, not to the index."""
    index = calibrated(4)
    index.add(vectors(2000, 1))
    state = index._state
    twin = copy.copy(index)
    twin.remove(twin.ids)
    twin.calibrate(vectors(500, 3, axes=5))
    twin.add(vectors(300, 4, axes=5))
    assert isinstance(twin._state.code, VectorCode)
    assert index._state is state
    x = vectors(2000, 1)
    queries = vectors(40, 2)
    assert recall(index.search(queries).ids, nearest(queries, x, "cosine")) > 0.85
