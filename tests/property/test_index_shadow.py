"""An index does what a dictionary of vectors would, whatever is asked of it in whatever order."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sixfold
from sixfold.errors import SixfoldError

pytestmark = pytest.mark.usefixtures("unhooked")

DIM = 24
# Of cosines in 8 bits: beyond ten standard deviations.
TOLERANCE = 0.03


class Shadow:
    """An index and the vectors that it should hold, in the order in which they came."""

    def __init__(self, seed: int, strings: bool, folder: Path) -> None:
        self.random, self.numbers = random.Random(seed), np.random.default_rng(seed)
        self.index, self.held = sixfold.Index(DIM, 8), dict[Any, np.ndarray]()
        self.strings, self.path = strings, folder / "index"
        self.saved: dict[Any, np.ndarray] | None = None

    def step(self) -> None:
        operations = (
            *(self.add, self.remove, self.search, self.upsert, self.file, self.refused),
            self.partition,
        )
        self.random.choices(operations, (30, 25, 30, 10, 2, 3, 1))[0]()
        assert len(self.index) == len(self.held)

    def vectors(self, count: int) -> np.ndarray:
        return self.numbers.normal(size=(count, DIM)).astype(np.float32)

    def some(self, most: int) -> list[Any]:
        count = min(self.random.randint(0, most), len(self.held))
        return self.random.sample(list(self.held), count)

    def add(self) -> None:
        # Few at a time, or more than a page, or many.
        x = self.vectors(self.random.choice((0, 1, 1, 1, 2, 5, 64, 100, 900)))
        ids = None
        if self.strings or self.random.random() < 0.3:
            ids = [self.fresh() for _ in x]
        self.held |= zip(self.index.add(x, ids).tolist(), x, strict=True)

    def fresh(self) -> Any:
        number = self.random.getrandbits(62)
        return f"{number:x}" if self.strings else number - 2**61

    def upsert(self) -> None:
        ids = self.some(70) + [self.fresh() for _ in range(self.random.randint(0, 3))]
        x = self.vectors(len(ids))
        self.index.add(x, ids, upsert=True)
        for id, row in zip(ids, x, strict=True):
            self.held.pop(id, None)
            self.held[id] = row

    def remove(self) -> None:
        ids = self.some(self.random.choice((1, 3, 50, 1200)))
        self.index.remove(ids)
        for id in ids:
            del self.held[id]

    def partition(self) -> None:
        if self.held:
            most = min(len(self.held), 40)
            self.index.partition(self.random.choice((None, self.random.randint(1, most))))
            ids = self.index.ids.tolist()
            assert len(ids) == len(self.held)
            self.held = {id: self.held[id] for id in ids}

    def refused(self) -> None:
        unknown = self.fresh()
        assert unknown not in self.index
        with pytest.raises(SixfoldError):
            self.index.remove([*self.some(3), unknown])
        if twice := self.some(1):
            with pytest.raises(SixfoldError):
                self.index.add(self.vectors(2), [unknown, *twice])
            assert twice[0] in self.index
        assert self.index.ids.tolist() == list(self.held)

    def file(self) -> None:
        if self.saved is None or self.random.random() < 0.5:
            self.index.save(self.path)
            self.saved = dict(self.held)
        self.index, self.held = sixfold.Index.load(self.path), dict(self.saved)

    def search(self) -> None:
        queries, k = self.vectors(self.random.choice((1, 3))), self.random.choice((1, 10, 200))
        allowed = None if self.random.random() < 0.6 else [*self.some(300), self.fresh()]
        lists, probes = self.index.lists, None
        if lists and self.random.random() < 0.5:
            probes = self.random.randint(1, lists)
        scores, ids = self.index.search(queries, k, filter=allowed, probes=probes)
        members = list(self.held) if allowed is None else [x for x in allowed if x in self.held]
        x = np.array([self.held[id] for id in members]).reshape(len(members), DIM)
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        exact = queries / np.linalg.norm(queries, axis=1, keepdims=True) @ unit.T
        place = {id: i for i, id in enumerate(members)}
        for q in range(len(queries)):
            found = [id for id in ids[q].tolist() if id in place]
            assert len(found) == len(set(found))
            if probes not in (None, lists):
                assert len(found) <= min(k, len(members))
                own = exact[q, [place[id] for id in found]]
                assert (np.abs(own - scores[q, : len(found)]) < TOLERANCE).all()
                continue
            assert len(found) == min(k, len(members))
            assert (scores[q, len(found) :] == -np.inf).all()
            own = exact[q, [place[id] for id in found]]
            assert (np.abs(own - scores[q, : len(found)]) < TOLERANCE).all()
            left = np.delete(exact[q], [place[id] for id in found])
            assert not len(left) or left.max() < own.min() + 2 * TOLERANCE


@pytest.mark.parametrize("strings", [False, True])
@pytest.mark.parametrize("steps", [600, pytest.param(50_000, marks=pytest.mark.slow)])
def test_random_operations(steps: int, strings: bool, tmp_path: Path) -> None:
    shadow = Shadow(steps, strings, tmp_path)
    for _ in range(steps):
        shadow.step()
    chosen = shadow.some(50)
    decoded = shadow.index.decode(chosen)
    for id, row in zip(chosen, decoded, strict=True):
        held = shadow.held[id]
        np.testing.assert_allclose(row, held / np.linalg.norm(held), atol=TOLERANCE)
