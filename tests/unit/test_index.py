"""The index: what it finds, and what becomes of it when vectors come and go."""

import copy
import enum
import pickle
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sixfold
from sixfold.codebooks import expected_mse
from sixfold.errors import OutOfRangeError, ShapeError, SixfoldError
from sixfold.index import index as index_module
from sixfold.index.segment import Segment
from tests.processes import printed
from tests.threads import on_threads

# Users have no shape checks either.
pytestmark = pytest.mark.usefixtures("unhooked")

METRICS = ("cosine", "ip", "l2")


def clustered(n: int, dim: int = 64, seed: int = 0) -> np.ndarray:
    """Vectors with neighbours, a mean, and norms that differ."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(20, dim)) * 0.7
    x = centres[random.integers(20, size=n)] + random.normal(size=(n, dim)) + 0.5
    return (x * random.uniform(0.5, 2, size=(n, 1))).astype(np.float32)


def exact_scores(queries: np.ndarray, x: np.ndarray, metric: str) -> np.ndarray:
    queries, x = queries.astype(np.float64), x.astype(np.float64)
    if metric == "l2":
        return -np.square(queries[:, None] - x).sum(2)
    if metric == "cosine":
        queries, x = (y / np.linalg.norm(y, axis=1, keepdims=True) for y in (queries, x))
    return queries @ x.T


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("count", "dim"), [(70, 384), (10, 4096), (1, 64), (3000, 128)])
def test_codes_do_not_depend_on_threads_or_company(count: int, dim: int, metric: Any) -> None:
    x = clustered(count, dim)

    def found() -> Any:
        index = sixfold.Index(dim, 2, metric)
        index.add(x)
        return index.search(x[:20], k=count)

    one, *others = on_threads(found, 1, 2, 3)
    for other in others:
        assert np.array_equal(one.scores, other.scores)
        assert np.array_equal(one.ids, other.ids)


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    hits = (len(set(a) & set(b)) for a, b in zip(found.tolist(), exact.tolist(), strict=True))
    return sum(hits) / exact.size


@pytest.mark.parametrize("metric", METRICS)
def test_scores_are_estimates_of_the_exact_ones(metric: Any) -> None:
    x, queries = clustered(3000), clustered(40, seed=1)
    exact = exact_scores(queries, x, metric)
    best = np.argsort(-exact, axis=1)[:, :10]
    found_of = {}
    for bits in index_module.BITS:
        index = sixfold.Index(64, bits, metric)
        index.add(x)
        scores, ids = index.search(queries)
        assert (np.diff(scores, axis=1) <= 0).all()
        error = scores - np.take_along_axis(exact, ids, 1)
        # Over all pairs errors are about unbiased; over the best of each query they are not.
        every = index.search(queries, k=3000)
        error = every.scores - np.take_along_axis(exact, every.ids, 1)
        found_of[bits] = recall(ids, best), np.sqrt(np.square(error).mean()) / exact.std()
        assert abs(error.mean()) < 0.01 * exact.std()
    assert [r for r, _ in found_of.values()] == sorted(r for r, _ in found_of.values())
    assert found_of[8][0] > 0.95
    assert found_of[4][0] > 0.8
    # Errors halve with every bit.
    assert found_of[2][1] < 0.6 * found_of[1][1]
    assert found_of[4][1] < 0.35 * found_of[2][1]
    assert found_of[4][1] < 0.1


def test_without_a_mean_that_is_shared_nothing_is_lost() -> None:
    """What is subtracted from vectors and queries only ever helps."""
    x = clustered(2000)
    far = x + 30
    index, moved = sixfold.Index(64, 4, "l2"), sixfold.Index(64, 4, "l2")
    index.add(x)
    moved.add(far)
    queries = clustered(30, seed=1)
    exact = np.argsort(-exact_scores(queries, x, "l2"), axis=1)[:, :10]
    assert recall(index.search(queries).ids, exact) > 0.8
    assert recall(moved.search(queries + 30).ids, exact) > 0.75


def test_what_is_added_one_by_one_is_found_as_well() -> None:
    x, queries = clustered(1500), clustered(30, seed=1)
    exact = np.argsort(-exact_scores(queries, x, "cosine"), axis=1)[:, :10]
    index = sixfold.Index(64)
    for row in x[:300]:
        index.add(row)
    for start in range(300, 1500, 37):
        index.add(x[start : start + 37])
    assert len(index) == 1500
    assert index.ids.tolist() == list(range(1500))
    at_once = sixfold.Index(64)
    at_once.add(x)
    found = recall(index.search(queries).ids, exact)
    assert found > recall(at_once.search(queries).ids, exact) - 0.03


@pytest.mark.parametrize("queries", [1, 5, 1100])
def test_a_query_finds_the_same_alone(queries: int) -> None:
    index = sixfold.Index(32, 2)
    index.add(clustered(700, 32))
    index.add(clustered(1700, 32, seed=2))
    asked = clustered(queries, 32, seed=3)
    scores, ids = index.search(asked, k=7)
    for q in (0, queries // 2, queries - 1):
        alone = index.search(asked[q], k=7)
        assert alone.ids.shape == (7,)
        assert np.array_equal(alone.ids, ids[q])
        np.testing.assert_allclose(alone.scores, scores[q], rtol=1e-5, atol=1e-6)


def test_forms_that_vectors_may_have(tmp_path: Path) -> None:
    x = clustered(100, 16)
    np.save(tmp_path / "x.npy", x)
    given = [
        x,
        x.astype(np.float64),
        torch.from_numpy(x),
        torch.from_numpy(x).double(),
        x.tolist(),
        np.load(tmp_path / "x.npy", mmap_mode="r"),
        np.asfortranarray(x),
        torch.from_numpy(np.repeat(x, 2, 0))[::2],
    ]
    found = []
    for form in given:
        index = sixfold.Index(16)
        index.add(form)
        found.append(index.search(given[len(found) % 4][:5], k=4).ids.tolist())
    assert all(each == found[0] for each in found)
    halves = sixfold.Index(16)
    halves.add(torch.from_numpy(x).bfloat16())
    assert halves.search(x[:5], k=1).ids[:, 0].tolist() == [0, 1, 2, 3, 4]
    whole = sixfold.Index(2, metric="l2")
    whole.add(np.array([[0, 0], [3, 4]], dtype=np.int8))
    assert whole.search([[3, 3]], k=1).ids.tolist() == [[1]]


@pytest.mark.parametrize("strings", [False, True])
def test_ids_of_ones_own(strings: bool) -> None:
    x = clustered(300, 32)
    ids = [f"a{i}" if strings else 10 * i - 1000 for i in range(300)]
    index = sixfold.Index(32, 8)
    assert index.add(x, ids).tolist() == ids
    assert index.search(x[7], k=1).ids.tolist() == [ids[7]]
    assert ids[7] in index
    index.remove([ids[7]])
    assert ids[7] not in index
    assert len(index) == 299
    assert index.search(x[7], k=1).ids.tolist() != [ids[7]]
    with pytest.raises(OutOfRangeError, match="not in the index"):
        index.remove([ids[8], ids[7]])
    assert ids[8] in index
    with pytest.raises(SixfoldError, match="more than once"):
        index.remove([ids[8], ids[8]])
    index.add(x[7], [ids[7]])
    assert index.search(x[7], k=1).ids.tolist() == [ids[7]]
    assert index.ids.tolist() == [*ids[:7], *ids[8:], ids[7]]


def test_ids_that_are_held_already() -> None:
    x = clustered(3, 8)
    index = sixfold.Index(8, 8)
    index.add(x[:2], [5, 6])
    with pytest.raises(SixfoldError, match=r"\[6\] are in the index already"):
        index.add(x[1:], [7, 6])
    assert index.ids.tolist() == [5, 6]
    index.add(x[1:], [7, 6], upsert=True)
    assert index.ids.tolist() == [5, 7, 6]
    assert index.search(x[2], k=1).ids.tolist() == [6]
    # Numbers go on behind the largest.
    assert index.add(x[:2]).tolist() == [8, 9]


def test_mixed_and_odd_ids() -> None:
    index = sixfold.Index(8)
    x = clustered(2, 8)
    for ids in (
        ["a", 1],
        [1.0, 2.0],
        [True, False],
        "ab",
        5,
        [2**63, 1],
        [None, 1],
        ["\ud800", "b"],
    ):
        with pytest.raises(SixfoldError):
            index.add(x, ids)
    with pytest.raises(SixfoldError, match="more than once"):
        index.add(x, [4, 4])
    with pytest.raises(ShapeError, match="an id for each"):
        index.add(x, [4])
    # NumPy's own strings end before a NUL.
    index.add(x, ["a", "a\0"])
    for ids in ([1, 2], np.array([3, 4])):
        with pytest.raises(SixfoldError, match="are strings"):
            index.add(x, ids)
    with pytest.raises(SixfoldError, match="pass one for each"):
        index.add(x)
    assert 3 not in index
    assert object() not in index
    assert len(index) == 2


def test_what_is_refused_changes_nothing() -> None:
    index = sixfold.Index(8)
    index.add(clustered(5, 8))
    for value in (np.nan, np.inf, -np.inf):
        bad = clustered(9000, 8)
        bad[8999, 3] = value
        with pytest.raises(SixfoldError, match="finite"):
            index.add(bad)
        with pytest.raises(SixfoldError, match="finite"):
            index.search(bad[8999])
    for x in (np.zeros((2, 7)), np.zeros((2, 2, 8)), np.zeros(0), 5, None, [["a"] * 8], "text"):
        with pytest.raises(SixfoldError):
            index.add(x)
    with pytest.raises(SixfoldError):
        index.add(np.zeros((1, 8), dtype=complex))
    other = sixfold.Index(8, metric="l2")
    with pytest.raises(SixfoldError, match="below 1e18/dim"):
        other.add(np.full((1, 8), 1e30))
    for k in (0, -1, 1.5, True):
        with pytest.raises(SixfoldError, match="k must be"):
            index.search(clustered(1, 8), k=k)
    assert index.ids.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "given", [{"dim": 0}, {"dim": 2.5}, {"bits": 5}, {"bits": 2.5}, {"metric": "dot"}, {"seed": -1}]
)
def test_arguments_of_an_index(given: dict[str, Any]) -> None:
    with pytest.raises(SixfoldError, match=next(iter(given))):
        sixfold.Index(**{"dim": 8, **given})


@pytest.mark.parametrize("metric", METRICS)
def test_zeros_and_numbers_of_any_size(metric: Any) -> None:
    x = clustered(70, 16)
    x[3] = 0
    sizes = [1e-30, 1.0, 1e15] if metric == "cosine" else [1e-10, 1.0, 1e8]
    found = []
    for size in sizes:
        index = sixfold.Index(16, 8, metric)
        index.add(x * np.float32(size))
        scores, ids = index.search(x[:6] * np.float32(size), k=3)
        assert np.isfinite(scores).all()
        found.append(ids.tolist())
    assert found[0] == found[1] == found[2]
    empty = sixfold.Index(16, metric=metric)
    empty.add(np.zeros((5, 16)))
    np.testing.assert_allclose(empty.search(np.zeros(16), k=2).scores, 0, atol=1e-6)


def test_fewer_than_are_wanted() -> None:
    index = sixfold.Index(8)
    scores, ids = index.search(np.ones((2, 8)), k=3)
    assert ids.tolist() == [[-1] * 3] * 2
    assert (scores == -np.inf).all()
    index.add(clustered(2, 8))
    scores, ids = index.search(np.ones((2, 8)), k=3)
    assert (ids[:, 2] == -1).all()
    assert (scores[:, 2] == -np.inf).all()
    assert index.add(np.zeros((0, 8))).tolist() == []
    assert index.search(np.zeros((0, 8)), k=3).ids.shape == (0, 3)
    named = sixfold.Index(8)
    named.add(clustered(1, 8), ["a"])
    assert named.search(np.ones(8), k=2).ids.tolist() == ["a", None]


def test_a_filter() -> None:
    index = sixfold.Index(32, 2)
    index.add(clustered(900, 32))
    index.add(clustered(900, 32, seed=1))
    queries = clustered(20, 32, seed=2)
    every = index.search(queries, k=1800)
    for allowed in ([5], range(0, 1800, 7), [10**6, 17], [], np.arange(1800)):
        found = index.search(queries, k=10, filter=allowed)
        members = set(allowed)
        for q in range(20):
            left = [i for i in every.ids[q].tolist() if i in members][:10]
            assert found.ids[q].tolist() == left + [-1] * (10 - len(left))
    assert (index.search(queries, filter=["a"]).ids == -1).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", [8, 33, 384])
def test_vectors_whose_mean_is_rounding(dim: int, metric: Any) -> None:
    """Each with its opposite: of the mean nothing is left but what float32 cannot hold."""
    half = np.random.default_rng(0).normal(size=(1500, dim)).astype(np.float32)
    x, queries = np.concatenate([half, -half]), clustered(50, dim, seed=1)
    index = sixfold.Index(dim, 8, metric)
    index.add(x)
    exact = exact_scores(queries, x, metric)
    scores, ids = index.search(queries)
    assert recall(ids, np.argsort(-exact, 1)[:, :10]) > 0.9
    error = scores - np.take_along_axis(exact, ids, 1)
    assert np.abs(error).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", [100, 384])
def test_many_queries_find_the_same_on_any_threads(dim: int, metric: Any) -> None:
    """So many that PyTorch cuts them for its threads, too."""
    index = sixfold.Index(dim, 2, metric)
    index.add(clustered(300, dim))
    queries = clustered(1024, dim, seed=1)
    found = on_threads(lambda: index.search(queries), 1, 2, 3, 7)
    for other in found[1:]:
        assert np.array_equal(other.scores, found[0].scores)
        assert np.array_equal(other.ids, found[0].ids)


def test_a_mask_is_a_filter() -> None:
    x = clustered(500)
    index = sixfold.Index(64)
    index.add(x, np.arange(500) * 2)
    mask = np.random.default_rng(0).random(700) < 0.3
    expected = index.search(x[:4], filter=np.flatnonzero(mask))
    for given in (mask, torch.from_numpy(mask)):
        found = index.search(x[:4], filter=given)
        assert np.array_equal(found.ids, expected.ids)
        assert np.array_equal(found.scores, expected.scores)
    assert index.search(x[0], filter=np.zeros(3, bool)).ids.tolist() == [-1] * 10
    nowhere = torch.ones(3, dtype=torch.bool, device="meta")
    for wrong in (np.ones((2, 2), bool), [True, False], nowhere):
        with pytest.raises(SixfoldError, match="filter"):
            index.search(x[0], filter=wrong)


def test_what_an_index_is_does_not_change() -> None:
    index = sixfold.Index(64, 2, "l2", seed=3)
    assert (index.dim, index.bits, index.metric, index.seed) == (64, 2, "l2", 3)
    for name in ("dim", "bits", "metric", "seed", "calibrated"):
        with pytest.raises(AttributeError):
            setattr(index, name, 1)


@pytest.mark.skipif(sys.platform != "linux", reason="others count in other units")
def test_a_search_takes_less_memory_than_the_codes() -> None:
    """Scores are not written: 2,000 queries on 200,000 vectors would have 1.6 GB of them."""
    script = """
import resource, numpy as np, sixfold
index = sixfold.Index(64, 4)
for part in range(20):
    index.add(np.random.default_rng(part).normal(size=(10_000, 64)).astype(np.float32))
codes = 200_000 * 36
queries = np.random.default_rng(0).normal(size=(2_000, 64)).astype(np.float32)
index.search(queries[:100])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
index.search(queries)
print(codes, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""
    codes, more = map(int, printed(script))
    assert more < codes


def test_removed_vectors_make_room() -> None:
    x = clustered(60_000, 32)
    index = sixfold.Index(32)
    index.add(x)
    before = index.nbytes
    index.remove(np.arange(0, 60_000, 2))
    assert index.nbytes < 0.6 * before
    left = np.arange(1, 60_000, 2)
    assert index.ids.tolist() == left.tolist()
    fresh = sixfold.Index(32)
    fresh.add(x)
    queries = clustered(20, 32, seed=2)
    expected = fresh.search(queries, filter=left)
    found = index.search(queries)
    assert np.array_equal(found.ids, expected.ids)
    assert np.array_equal(found.scores, expected.scores)
    index.remove(left)
    assert len(index) == 0
    assert index.nbytes == 0
    index.add(x[:3])
    assert index.ids.tolist() == [60_000, 60_001, 60_002]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_decoded_vectors(bits: int) -> None:
    x = clustered(500, 64)
    index = sixfold.Index(64, bits, "l2")
    index.add(x[:300])
    index.add(x[300:], ids=np.arange(1000, 1200))
    chosen = np.array([5, 299, 1199, 0])
    decoded = index.decode(chosen)
    original = x[[5, 299, 499, 0]]
    error = np.square(decoded - original).sum() / np.square(original - x.mean(0)).sum()
    assert error < 1.2 * expected_mse(64, bits)
    with pytest.raises(OutOfRangeError):
        index.decode([999])
    assert index.decode([]).shape == (0, 64)


def test_bytes_are_those_of_the_codes() -> None:
    for bits, size in ((1, 48), (2, 96), (4, 192), (8, 384)):
        index = sixfold.Index(384, bits)
        index.add(clustered(6400, 384))
        # A scale and an offset of two bytes, an id, where it is, a bit; a mean.
        assert index.nbytes / 6400 == pytest.approx(size + 4 + 8 + 16, abs=0.5)


def test_threads_search_while_one_changes_the_index() -> None:
    x = clustered(4000, 32)
    index = sixfold.Index(32, 4)
    index.add(x[:1000])
    errors: list[str] = []
    stop = threading.Event()

    def search() -> None:
        while not stop.is_set():
            scores, ids = index.search(x[:8], k=3)
            if not (np.diff(scores, axis=1) <= 0).all() or (ids < 0).any():
                errors.append("a search saw half of a change")
            for q in range(8):
                # Never removed: always there, and always nearest to themselves.
                if ids[q, 0] != q:
                    errors.append(f"query {q} found {ids[q].tolist()}")

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    for start in range(1000, 4000, 100):
        index.add(x[start : start + 100])
        index.remove(np.arange(start - 900, start - 850))
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors, errors[:3]
    assert len(index) == 4000 - 30 * 50


def test_an_interrupt_leaves_the_index_as_it_was_or_will_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = clustered(300, 16)
    index = sixfold.Index(16)
    index.add(x[:200])

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    def stopped(owner: type, name: str, action: Callable[[], Any]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                action()

    stopped(index_module.IdTable, "put", lambda: index.add(x[200:]))
    # The vectors are there, so their ids are.
    assert 250 in index
    stopped(index_module.IdTable, "remove", lambda: index.remove([250]))
    assert 250 not in index
    assert len(index) == 299
    stopped(Segment, "append", lambda: index.add(x[:5]))
    assert len(index) == 299
    assert index.add(x[:5]).tolist() == [300, 301, 302, 303, 304]


def test_a_million_ids_in_and_out() -> None:
    """Beyond what is kept in a dictionary."""
    table = index_module.IdTable()
    random = np.random.default_rng(0)
    ids = random.permutation(200_000).astype(np.int64)
    table.put(ids, np.arange(200_000))
    for start in range(200_000, 230_000, 100):
        more = np.arange(start, start + 100)
        table.put(more, more)
    table.remove(ids[:50_000])
    assert (table.find(ids[:50_000]) == -1).all()
    assert np.array_equal(table.find(ids[50_000:]), np.arange(50_000, 200_000))
    assert np.array_equal(table.find(np.arange(200_000, 230_000)), np.arange(200_000, 230_000))
    table.put(ids[:10], np.arange(10))
    assert np.array_equal(table.find(ids[:10]), np.arange(10))


def test_a_child_process_may_go_on() -> None:
    """An index that a fork takes along."""
    found = printed(
        """
import os, numpy as np, sixfold
x = np.random.default_rng(0).normal(size=(5000, 32)).astype(np.float32)
index = sixfold.Index(32); index.add(x)
found = index.search(x[:200]).ids
child = os.fork()
if child == 0:
    index.add(x[:10])
    os._exit(0 if np.array_equal(index.search(x[:200], filter=range(5000)).ids, found) else 1)
print(os.waitpid(child, 0)[1])
"""
    )
    assert found == ["0"]


def test_what_changes_leaves_no_trail_of_parts(tmp_path: Path) -> None:
    """However often a file is loaded, added to and saved, or vectors are replaced."""
    index = sixfold.Index(16)
    index.add(clustered(2000, 16))
    for seed in range(40):
        index.save(tmp_path / "index")
        index = sixfold.Index.load(tmp_path / "index")
        index.add(clustered(100, 16, seed=seed))
        index.add(clustered(100, 16, seed=seed), index.ids[:100], upsert=True)
        index.remove(index.ids[:60])
    assert len(index._state.segments) == 1
    for _ in range(30):
        index.remove(index.ids[1:])
        index.add(clustered(1100, 16))
    assert len(index._state.segments) <= 2


@pytest.mark.parametrize("metric", METRICS)
def test_means_follow_what_is_held(metric: Any) -> None:
    """Of vectors that are gone, nothing is left; of those that come to be elsewhere, theirs."""
    x, queries = clustered(2500, 32), clustered(30, 32, seed=1)
    moved, far = (y + 40 for y in (x, queries))
    best = np.argsort(-exact_scores(far, moved, metric), axis=1)[:, :10]
    fresh = sixfold.Index(32, 8, metric)
    fresh.add(moved)
    expected = recall(fresh.search(far).ids, best)
    emptied, replaced, grown = (sixfold.Index(32, 8, metric) for _ in range(3))
    for index in (emptied, replaced):
        index.add(x)
    emptied.remove(emptied.ids)
    emptied.add(moved, np.arange(2500))
    replaced.add(moved, np.arange(2500), upsert=True)
    for start in range(0, 2500, 50):
        grown.add(moved[start : start + 50])
    for index in (emptied, replaced, grown):
        assert recall(index.search(far).ids, best) > expected - 0.05
    # Few at a time: the first of them show that they are elsewhere.
    drifting = sixfold.Index(32, 8, metric)
    drifting.add(x)
    for start in range(0, 2500, 50):
        drifting.add(moved[start : start + 50])
    assert len(drifting._state.segments) == 2
    later = np.arange(300, 2500)
    best = np.argsort(-exact_scores(far, moved[later], metric), axis=1)[:, :10] + 2800
    assert recall(drifting.search(far, filter=later + 2500).ids, best) > expected - 0.05


def test_a_copy_is_an_index_of_its_own() -> None:
    x = clustered(300, 16)
    for few in (40, 1500):
        first = sixfold.Index(16, 8)
        first.add(clustered(few, 16, seed=5), np.arange(few) + 10_000)
        for copied in (copy.copy(first), copy.deepcopy(first)):
            first.add(x[:50], np.arange(50))
            copied.add(x[50:100], np.arange(50) + 500)
            assert first.search(x[3], k=1).ids.tolist() == [3]
            assert copied.search(x[53], k=1).ids.tolist() == [503]
            assert len(copied) == len(first) == few + 50
            assert 3 not in copied
            first.remove(np.arange(50))
        with pytest.raises(SixfoldError, match="save it to a file"):
            pickle.dumps(first)


def test_what_interrupts_a_change_may_search_and_nothing_else() -> None:
    index = sixfold.Index(16)
    index.add(clustered(3000, 16))
    refused: list[str] = []

    def interrupt(*args: Any) -> None:
        assert len(index.search(np.ones(16)).ids) == 10
        try:
            index.add(np.ones(16))
        except SixfoldError as error:
            refused.append(str(error))
        # Not before: on a busy machine handlers would interrupt each other without end.
        signal.setitimer(signal.ITIMER_REAL, 0.002)

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.002)
        for _ in range(30):
            index.add(clustered(200, 16))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert all("in use by what this call interrupted" in text for text in refused)
    assert len(index) >= 9000
    ids = index.ids
    assert len(set(ids.tolist())) == len(index)
    index.remove(ids[::2])
    assert index.ids.tolist() == ids[1::2].tolist()


def test_inside_and_outside_of_inference_mode(tmp_path: Path) -> None:
    x = clustered(200, 16)
    with torch.inference_mode():
        index = sixfold.Index(16)
        index.add(x)
        index.save(tmp_path / "index")
        loaded = sixfold.Index.load(tmp_path / "index")
    for each in (index, loaded):
        each.add(x)
        assert len(each.search(torch.ones(16, requires_grad=True)).ids) == 10


@pytest.mark.parametrize("dim", [1, 2, 3, 5, 127, 513, 1001, 2047])
def test_any_dimension(dim: int) -> None:
    x = clustered(200, dim)
    index = sixfold.Index(dim, 8)
    index.add(x)
    if dim > 100:
        assert (index.search(x[:50], k=1).ids[:, 0] == np.arange(50)).all()
    assert index.decode([3]).shape == (1, dim)


def test_tensors_and_arrays_of_odd_kinds() -> None:
    index = sixfold.Index(8)
    x = clustered(4, 8)
    odd = [
        np.ma.masked_invalid(x),
        torch.from_numpy(x).to_sparse(),
        torch.empty(4, 8, device="meta"),
        torch.nested.nested_tensor([torch.ones(8), torch.ones(8)], layout=torch.jagged),
        torch.complex(torch.ones(4, 8), torch.ones(4, 8)),
        np.full((4, 8), 1e300),
        np.zeros((4, 8), dtype="datetime64[s]"),
        [[1.0] * 8, [1.0] * 7],
        [[None] * 8],
    ]
    for given in odd:
        with pytest.raises(SixfoldError):
            index.add(given)
        with pytest.raises(SixfoldError):
            index.search(given)
    index.add(x)
    for ids in (
        torch.tensor([1.0]),
        torch.empty(1, dtype=torch.int64, device="meta"),
        torch.ones(1, dtype=torch.bfloat16),
        np.zeros(1, dtype="datetime64[s]"),
        [object()],
    ):
        for call in (index.remove, index.decode):
            with pytest.raises(SixfoldError):
                call(ids)
    with pytest.raises(SixfoldError, match="k must be"):
        index.search(x, k=2**31)

    class Colour(enum.StrEnum):
        RED = "red"

    named = sixfold.Index(8)
    named.add(x[:1], [Colour.RED])
    assert "red" in named


def test_copies_share_no_memory_that_either_writes_to() -> None:
    """Not even of a segment that becomes the last."""
    first = sixfold.Index(16, 8, "l2")
    first.add(clustered(1500, 16))
    first.add(clustered(1500, 16) + 50)
    second = copy.copy(first)
    assert len(first._state.segments) == 2
    for index in (first, second):
        index.remove(np.arange(1500, 3000))
    x = clustered(20, 16, seed=3)
    first.add(x[:10], np.arange(10) + 7000)
    second.add(x[10:], np.arange(10) + 8000)
    for index, own, start in ((first, x[:10], 7000), (second, x[10:], 8000)):
        assert index.search(own, k=1).ids[:, 0].tolist() == list(range(start, start + 10))


def test_removing_within_inference_mode() -> None:
    for few in (200, 3000):
        index = sixfold.Index(16)
        index.add(clustered(few, 16))
        with torch.inference_mode():
            index.remove(np.arange(few // 2))
        index.add(clustered(1, 16))
        assert len(index) == few - few // 2 + 1


def test_an_interrupt_that_is_kept_holds_nothing() -> None:
    """In a process of its own: here, callbacks of test tools would meet the exceptions."""
    found = printed(
        """
import signal, threading
import numpy as np, sixfold

class Stop(Exception):
    pass

def stop(*args):
    raise Stop

index = sixfold.Index(16)
index.add(np.ones((300, 16)))
signal.signal(signal.SIGALRM, stop)
kept = []
for turn in range(3000):
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-5 + turn % 100 * 1e-6)
        for _ in range(1000):
            assert 3 in index
    except Stop as error:
        kept.append(error)
threading.Thread(target=lambda: print(3 in index), daemon=True).start()
threading.Event().wait(0.5)
print(len(kept) > 1500)
"""
    )
    assert found == ["True", "True"]


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_equal_vectors_are_at_one_place(metric: Any) -> None:
    index = sixfold.Index(24, 8, metric)
    equal = np.full((300, 24), 0.3, dtype=np.float32)
    for _ in range(80):
        index.add(equal)
    assert len(index._state.segments) <= 2
    x = clustered(1500, 24) - 3
    ids = index.add(x)
    found = index.search(x[:100], k=1).ids[:, 0]
    assert (found == ids[:100]).mean() > 0.95


def test_means_of_what_comes_in_turns() -> None:
    """Each batch is coded with a mean that is near."""
    x, far = clustered(3000, 24), clustered(3000, 24) + 60

    def found(index: sixfold.Index, rows: np.ndarray, ids: np.ndarray) -> float:
        scores = exact_scores(rows[:40], rows, "l2")
        best = ids[np.argsort(-scores, axis=1)[:, :10]]
        return recall(index.search(rows[:40], filter=ids).ids, best)

    pending = sixfold.Index(24, 8, "l2")
    pending.add(x[:2000])
    for row in far[:300]:
        pending.add(row)
    ids = pending.add(x[2000:])
    assert found(pending, x[2000:], ids) > 0.85
    for first, second in ((600, 599), (1023, 1000), (300, 1500)):
        index = sixfold.Index(24, 8, "l2")
        index.add(x[:first])
        ids = index.add(far[:second])
        assert found(index, far[:second], ids) > 0.85
        assert found(index, x[:first], np.arange(first)) > 0.85


@pytest.mark.parametrize("metric", METRICS)
def test_the_reference_finds_the_same(metric: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for queries of which the kernel rounds coordinates to 8 bits."""
    index = sixfold.Index(48, 4, metric)
    index.add(clustered(1300, 48))
    index.remove(np.arange(0, 400, 3))
    queries = clustered(20, 48, seed=1)
    found = index.search(queries)
    monkeypatch.setenv("SIXFOLD_BACKEND", "reference")
    again = sixfold.Index(48, 4, metric)
    again.add(clustered(1300, 48))
    again.remove(np.arange(0, 400, 3))
    for other in (index, again):
        plain = other.search(queries)
        assert recall(plain.ids, found.ids) > 0.95
        scale = np.abs(plain.scores).max()
        np.testing.assert_allclose(plain.scores, found.scores, atol=0.02 * scale)
