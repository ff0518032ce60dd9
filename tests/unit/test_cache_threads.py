"""Forks of one cache that go on in several threads at once."""

import copy
import pickle
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from sixfold.cache import CompressedLayer
from sixfold.kernels import _native
from tests.layers import Shape, feed

SHAPE = Shape(batch=1, kv_heads=1, groups=1)
REQUESTS, THREADS, KINDS = 1_000, 4, 20


@pytest.fixture(autouse=True)
def eager_switches() -> Iterator[None]:
    """Threads that take turns as often as Python lets them."""
    threads, interval = torch.get_num_threads(), sys.getswitchinterval()
    torch.set_num_threads(1)
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)
    torch.set_num_threads(threads)


def grown() -> CompressedLayer:
    """A layer whose last slab has slots to spare, free ones that were used before among them."""
    layer = SHAPE.layer()
    feed(layer, SHAPE.tokens(200, seed=99))
    grow(layer, SHAPE.tokens(256, seed=98))
    grow(layer.fork(), SHAPE.tokens(128, seed=97))
    return layer


def grow(layer: CompressedLayer, tokens: tuple[Tensor, Tensor, Tensor]) -> None:
    """Append pages and turn them into codes."""
    for keys, values in zip(*(x.split(64, 2) for x in tokens[1:]), strict=True):
        layer.append(keys, values)
        layer.compress()


def request(base: CompressedLayer, kind: int) -> list[Tensor]:
    """What a fork that goes on by itself answers, and what it holds."""
    layer = base.fork()
    grow(layer, SHAPE.tokens(128, seed=kind))
    return [feed(layer, SHAPE.tokens(1, seed=kind)), *layer.dequantized()]


def test_requests_on_forks_in_threads_get_what_they_get_alone() -> None:
    expected = [request(grown(), kind) for kind in range(KINDS)]
    base = grown()
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda i: request(base, i % KINDS), range(REQUESTS)))
    # The reference merges slab by slab, and rounds as often as there are.
    tolerance = 1e-5 if isinstance(_native.extension(), str) else 0.0
    for number, (out, *held) in enumerate(found):
        wanted, *tokens = expected[number % KINDS]
        torch.testing.assert_close(out, wanted, rtol=tolerance, atol=tolerance)
        assert all(map(torch.equal, held, tokens)), f"request {number} holds another's pages"


def test_forks_that_live_side_by_side_own_their_pages() -> None:
    base = grown()
    with ThreadPoolExecutor(THREADS) as pool:
        forks = list(pool.map(lambda _: base.fork(), range(40)))
        list(pool.map(lambda i: grow(forks[i], SHAPE.tokens(128, seed=i)), range(40)))
    shared = base.history.runs
    kept = [{int(s) for s in run.slots.flatten()} for run in shared]
    taken: set[tuple[int, int]] = set()
    for fork in forks:
        for run in fork.history.runs:
            known = [k for own, k in zip(shared, kept, strict=True) if own.slab is run.slab]
            new = {int(s) for s in run.slots.flatten()} - (known[0] if known else set())
            owned = {(id(run.slab), slot) for slot in new}
            assert not owned & taken
            taken |= owned


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copied_history_has_pages_of_its_own(duplicate: object) -> None:
    base = grown()
    before = base.dequantized()
    assert callable(duplicate)
    twin = duplicate(base.history)
    pages = {x.data_ptr() for run in base.history.runs for x in run.slab.pool}
    assert not pages & {x.data_ptr() for run in twin.runs for x in run.slab.pool}
    base.history = twin
    assert all(map(torch.equal, base.dequantized(), before))
    grow(base, SHAPE.tokens(128, seed=1))
    assert torch.equal(base.dequantized()[0][:, :, :300], before[0][:, :, :300])
