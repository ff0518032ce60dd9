"""An index whose vectors lie in lists: a search that looks at some finds what is in those."""

import copy
import threading
from typing import Any

import numpy as np
import pytest
import torch

import sixfold
from sixfold.errors import SixfoldError
from sixfold.index import state
from tests.threads import on_threads
from tests.unit.test_index import METRICS, clustered, exact_scores, recall

pytestmark = pytest.mark.usefixtures("unhooked")

DIM = 64


def filled(count: int = 3000, metric: Any = "cosine", bits: int = 4) -> sixfold.Index:
    index = sixfold.Index(DIM, bits, metric)
    index.add(clustered(count))
    return index


def same(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        assert np.array_equal(a, b)


def members(index: sixfold.Index, lists: list[int]) -> list[Any]:
    """Ids of the vectors of these lists, and of those that are in none."""
    found: list[Any] = []
    for segment in index._state.segments:
        live = segment.live_slots()
        if segment.bounds is not None:
            number = np.searchsorted(segment.bounds, live, side="right") - 1
            live = live[np.isin(number, lists)]
        found += segment.ids[live].tolist()
    return found


def probed(index: sixfold.Index, query: np.ndarray, probes: int) -> list[int]:
    """Numbers of the lists that a query looks at."""
    centroids = index._state.lists
    assert centroids is not None
    asked = index._state.prepared(torch.from_numpy(query[None]).double())
    slots: list[int] = centroids.search(asked, probes, centroids.allowed)[1][0].tolist()
    return slots


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_codes_stay_as_they_are(bits: int, metric: Any) -> None:
    index, queries = filled(2000, metric, bits), clustered(20, seed=1)
    before, decoded = index.search(queries, k=50), index.decode(index.ids)
    ids = index.ids
    index.partition()
    assert index.lists == 45
    same(index.search(queries, k=50), before)
    same(index.search(queries, k=50, probes=45), before)
    same(index.search(queries, k=50, probes=10**6), before)
    assert sorted(index.ids.tolist()) == ids.tolist()
    assert np.array_equal(index.decode(ids), decoded)


@pytest.mark.parametrize("metric", METRICS)
def test_what_is_found_is_what_a_filter_of_the_lists_leaves(metric: Any) -> None:
    index, queries = filled(3000, metric), clustered(12, seed=1)
    index.partition(40)
    index.add(clustered(100, seed=2))
    index.remove(index.ids[::7])
    index.add(clustered(3, seed=3), [-5, -6, -7])
    allowed = index.ids[::2]
    together = index.search(queries, k=30, probes=3)
    narrow = index.search(queries, k=30, probes=3, filter=allowed)
    for number, query in enumerate(queries):
        own = members(index, probed(index, query, 3))
        assert 50 < len(own) < 1500
        expected = index.search(query, k=30, filter=own)
        same(index.search(query, k=30, probes=3), expected)
        same((together.scores[number], together.ids[number]), expected)
        both = [*{*own} & {*allowed.tolist()}]
        same((narrow.scores[number], narrow.ids[number]), index.search(query, 30, filter=both))


@pytest.mark.parametrize("metric", METRICS)
def test_a_mean_that_is_not_settled_stays(metric: Any) -> None:
    """Of few vectors, added one after another, the mean is that of the first."""
    index, queries = sixfold.Index(DIM, 4, metric), clustered(5, seed=1)
    for count in (500, 50):
        index.add(clustered(count, seed=count) + count / 100)
    before, decoded = index.search(queries, k=550), index.decode(range(550))
    index.partition(5)
    same(index.search(queries, k=550), before)
    assert np.array_equal(index.decode(range(550)), decoded)


def test_nobody_waits_for_a_partition() -> None:
    index, query = filled(20_000, bits=8), clustered(1, seed=1)
    expected = index.search(query, filter=range(100))
    partitioned = threading.Thread(target=index.partition, args=(2000,))
    partitioned.start()
    met = 0
    while partitioned.is_alive():
        found = index.search(query, filter=range(100))
        met += partitioned.is_alive() and index.lists == 0
        same(found, expected)
        assert 5 in index
    assert met > 3


def test_as_many_lists_as_vectors() -> None:
    index, queries = filled(700, bits=8), clustered(700)[::7]
    index.partition(700)
    for probes in (1, 50, 699):
        found = index.search(queries, k=1, probes=probes).ids[:, 0]
        assert (found == np.arange(0, 700, 7)).mean() > 0.9
    for query in queries[:5]:
        own = members(index, probed(index, query, 300))
        same(index.search(query, k=30, probes=300), index.search(query, k=30, filter=own))


@pytest.mark.parametrize("metric", METRICS)
def test_few_lists_hold_most_of_what_is_near(metric: Any) -> None:
    x, queries = clustered(6000), clustered(100, seed=0)
    index = sixfold.Index(DIM, 8, metric)
    index.add(x)
    index.partition(60)
    best = np.argsort(-exact_scores(queries, x, metric), 1, kind="stable")[:, :10]
    found = [recall(index.search(queries, probes=n).ids, best) for n in (1, 4, 16, 60)]
    assert found == sorted(found)
    # A fifteenth of the vectors, at random, would hold a fifteenth.
    assert found[1] > (0.3 if metric == "ip" else 0.6)
    assert found[3] > 0.95
    sizes = np.diff(index._state.segments[0].bounds)
    assert sizes.sum() == 6000
    assert sizes.max() < 1200


def test_neither_threads_nor_company_matter() -> None:
    index, queries = filled(20_000), clustered(40, seed=1)
    index.partition()
    first, second = on_threads(lambda: index.search(queries, probes=5), 1, 2)
    same(first, second)
    alone = [index.search(query, probes=5) for query in queries]
    same((np.stack([x for x, _ in alone]), np.stack([x for _, x in alone])), first)
    again = filled(20_000)
    for count in on_threads(lambda: again.partition() or again.ids, 2):
        assert np.array_equal(count, index.ids)


def test_vectors_that_come_later_are_found_by_every_search() -> None:
    index, x = filled(), clustered(30, seed=5)
    index.partition()
    ids = index.add(x)
    found = index.search(x, k=1, probes=1)
    assert found.ids[:, 0].tolist() == ids.tolist()
    index.add(-x, ids, upsert=True)
    assert index.search(-x, k=1, probes=1).ids[:, 0].tolist() == ids.tolist()
    # Until they are in lists as well.
    index.partition()
    assert len(index._state.segments) == 1
    assert index.search(-x, k=1).ids[:, 0].tolist() == ids.tolist()


def test_lists_stay_while_vectors_go() -> None:
    index, queries = filled(), clustered(10, seed=1)
    index.partition(20)
    own = [members(index, probed(index, query, 2)) for query in queries]
    gone = index.ids[np.random.default_rng(0).permutation(3000)[:2000]]
    index.remove(gone)
    assert index._state.segments[0].used < 3000
    left = {*index.ids.tolist()}
    for query, ids in zip(queries, own, strict=True):
        assert {*members(index, probed(index, query, 2))} == {*ids} & left
        expected = index.search(query, filter=[*{*ids} & left])
        same(index.search(query, probes=2), expected)
    index.remove(index.ids)
    assert index.lists == 20
    assert index.search(queries, k=2, probes=1).ids.tolist() == [[-1, -1]] * 10
    ids = index.add(queries)
    assert index.search(queries, k=1, probes=1).ids[:, 0].tolist() == ids.tolist()
    index.add(-queries, ids, upsert=True)
    assert index.search(-queries, k=1, probes=1).ids[:, 0].tolist() == ids.tolist()
    index.remove(ids)
    index.calibrate(clustered(500))
    assert index.lists == 0


def test_partitioning_again_and_again_makes_no_more_segments() -> None:
    index = filled(100)
    for number in range(80):
        index.add(clustered(20, seed=number + 1))
        index.partition()
    assert len(index._state.segments) == 1
    assert len(index) == 100 + 80 * 20
    assert index.search(clustered(20, seed=3), k=1).scores.min() > 0.9


def test_segments_have_a_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(state, "MOST_SEGMENTS", 3)
    index = sixfold.Index(DIM, 8, "l2")
    for number in range(5):
        index.add(clustered(1500, seed=number) + 20 * number)
        index.partition()
        index.save(tmp_path / "index")
        assert len(sixfold.Index.load(tmp_path / "index")._state.segments) <= 3
    queries = clustered(1500, seed=4)[:20] + 80
    found = index.search(queries, k=1, probes=index.lists)
    same(found, index.search(queries, k=1))
    # Means no longer fit those that came last.
    assert (found.ids[:, 0] == np.arange(6000, 6020)).mean() > 0.8


def test_a_copy_has_lists_of_its_own() -> None:
    index = filled(500)
    index.partition(5)
    twin = copy.copy(index)
    twin.partition(9)
    twin.add(clustered(10, seed=2))
    index.add(clustered(20, seed=3))
    assert (index.lists, twin.lists) == (5, 9)
    assert (len(index), len(twin)) == (520, 510)


@pytest.mark.parametrize("metric", METRICS)
def test_vectors_that_are_alike(metric: Any) -> None:
    """Fewer places than lists."""
    x = np.repeat(clustered(3), 200, 0)
    for zero in (False, True):
        index = sixfold.Index(DIM, 4, metric)
        index.add(np.zeros_like(x) if zero else x)
        index.partition(50)
        found = index.search(x[[0, 200, 400]], k=600)
        assert sorted(found.ids[0].tolist()) == [*range(600)]
        assert index.search(x[:2], k=5, probes=1).scores.shape == (2, 5)
    one = sixfold.Index(DIM, 4, metric)
    one.add(x[0])
    one.partition()
    same(one.search(x[:1], k=2, probes=1), one.search(x[:1], k=2))


def test_strings_and_calibrated_and_refined() -> None:
    x = clustered(2000) * np.geomspace(10, 0.1, DIM).astype(np.float32)
    index = sixfold.Index(DIM, 2, "ip")
    index.calibrate(x[:1000])
    assert index.calibrated
    index.add(x, [f"n{i}" for i in range(2000)])
    queries, before = x[:20], index.search(x[:20], k=20)
    index.partition()
    same(index.search(queries, k=20), before)
    read: Any = lambda ids: x[[int(id[1:]) for id in ids]]  # noqa: E731
    exact = np.sort(exact_scores(queries, x, "ip"), 1)[:, -1]
    found = index.search(queries, k=1, refine=read, probes=index.lists)
    assert np.allclose(found.scores[:, 0], exact, rtol=1e-5)
    some = index.search(queries, k=10, refine=read, probes=3)
    numbers = np.array([[int(id[1:]) for id in row] for row in some.ids])
    own = np.take_along_axis(exact_scores(queries, x, "ip"), numbers, 1)
    assert np.allclose(some.scores, own, rtol=1e-5)


def test_what_cannot_be_partitioned() -> None:
    index = sixfold.Index(DIM)
    with pytest.raises(SixfoldError, match="no vectors"):
        index.partition()
    index.add(clustered(10))
    with pytest.raises(SixfoldError, match=r"call partition\(\)"):
        index.search(clustered(1), probes=3)
    with pytest.raises(SixfoldError, match="at most the 10 vectors"):
        index.partition(11)
    for wrong in (0, -1, 1.5, "3", True):
        with pytest.raises(SixfoldError, match="lists"):
            index.partition(wrong)  # type: ignore[arg-type]
        with pytest.raises(SixfoldError, match="probes"):
            index.search(clustered(1), probes=wrong)  # type: ignore[arg-type]
    assert index.lists == 0
