"""A vector index that holds codes and nothing else."""

import dataclasses
import os
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple, Self, get_args

import numpy as np
import torch
from torch import Tensor

from sixfold.arguments import MOST_SEED, choice, flag, shown, whole
from sixfold.cache.coder import Coder
from sixfold.errors import OutOfRangeError, ShapeError, SixfoldError
from sixfold.index.files import FileState, load_index, save_index
from sixfold.index.ids import Ids, IdTable, checked_ids, missing, repeated
from sixfold.index.metric import Metric, prepared
from sixfold.index.segment import (
    BITS,
    MOST_DIM,
    Segment,
    bitmap,
    least_capacity,
    mean_of,
)
from sixfold.kernels._autocast import outside_autocast

# Vectors that are converted, and queries that are searched for, at a time.
BLOCK = 4096
QUERY_BLOCK = 1024
# Vectors, from all over those that are added, that a mean is estimated from.
SAMPLE = 8192
# Of the vectors of a segment: where fewer are left, those are moved together.
LEAST_LIVE = 3 / 4
# A slot is a segment's number and a place in it.
PLACES = 2**40


class Neighbors(NamedTuple):
    """What a search found.

    Attributes:
        scores: float32 [queries, k], descending; -inf where the index has no more vectors.
        ids: int64 [queries, k], -1 there; strings as objects, None there.
    """

    scores: np.ndarray
    ids: np.ndarray


@dataclasses.dataclass(frozen=True)
class State:
    """Everything that a search reads, replaced as one."""

    segments: tuple[Segment, ...] = ()
    total: Tensor | None = None
    count: int = 0
    next_id: int = 0
    strings: bool | None = None

    @property
    def live(self) -> int:
        """Vectors held."""
        return sum(segment.live for segment in self.segments)


class Index:
    """Nearest neighbours among vectors of which 1 to 8 bits a coordinate are held.

    No training: vectors can be searched for as soon as they are added, and may be added one by one.
    Any number of threads may search while one changes the index: each search sees it as it was when
    it began. Everything is on the CPU.

    Attributes:
        dim: Coordinates of a vector.
        bits: 1, 2, 3, 4 or 8 a coordinate.
        metric: `"cosine"`, `"ip"` (inner product) or `"l2"`, for which a score is the negative
            squared distance: the highest score is always the best.
        seed: Of the random rotation.

    Source: arXiv:2504.19874; scales that make inner products unbiased from arXiv:2108.08842 (EDEN);
        subtracting the mean from vectors and queries, as RaBitQ does (arXiv:2405.12497).
    """

    def __init__(
        self, dim: int, bits: int = 4, metric: Metric = "cosine", *, seed: int = 0
    ) -> None:
        """An empty index.

        Raises:
            SixfoldError: An argument has none of the values above.
        """
        self.dim = whole("dim", dim, 1, MOST_DIM)
        self.bits = choice("bits", bits, BITS)
        self.metric = choice("metric", metric, get_args(Metric))
        self.seed = whole("seed", seed, 0, MOST_SEED - 1)
        self._coder = Coder("key", self.dim, self.bits, self.seed, "unbiased")
        self._lock = threading.RLock()
        self._state = State()
        # Made again from the state whenever it is not that state's: after an interrupt, say.
        self._table: tuple[State, IdTable] = self._state, IdTable()

    def __len__(self) -> int:
        """Vectors held."""
        return self._state.live

    def __contains__(self, id: Any) -> bool:
        """Whether there is a vector of this id."""
        try:
            ids = checked_ids([id])
        except SixfoldError:
            return False
        with self._lock:
            return self._kind_fits(ids) and bool(self._slots(ids)[0] >= 0)

    def __repr__(self) -> str:
        """What it is, in a line."""
        held = f"{len(self):,} vectors of {self.dim} coordinates, {self.bits} bits"
        return f"Index({held}, {self.metric}, {self.nbytes / 1e6:,.1f} MB)"

    @property
    def nbytes(self) -> int:
        """Bytes of all vectors held, with their ids; removed ones count until they are cleared."""
        with self._lock:
            held = sum(segment.nbytes for segment in self._state.segments)
            return held + self._current_table().nbytes

    @property
    def ids(self) -> np.ndarray:
        """The ids of all vectors held, in the order in which they were added."""
        found = [s.ids[s.live_slots()] for s in self._state.segments]
        return np.concatenate(found) if found else np.empty(0, dtype=np.int64)

    @outside_autocast
    @torch.no_grad()
    def add(self, vectors: Any, ids: Any = None, *, upsert: bool = False) -> np.ndarray:
        """Add vectors; all of them or, where one cannot be, none.

        Args:
            vectors: [n, dim], or [dim] for one: a numpy array (a memory map is read piece by
                piece), a torch tensor or nested lists, of finite numbers.
            ids: One for each: whole numbers of 64 bits, or strings; an index holds one kind. By
                default the numbers from 0 on, or from the largest id held so far.
            upsert: Replace vectors whose ids are held already, which is an error otherwise.

        Returns:
            The ids.

        Raises:
            ShapeError: Vectors are not [n, dim], or there is not one id for each.
            SixfoldError: Vectors are not finite, ids occur twice or are held already.
        """
        source = _Rows("vectors", vectors, self.dim)
        upsert = flag("upsert", upsert)
        given = None if ids is None else checked_ids(ids)
        source.check_finite(self.metric)
        with self._lock:
            state = self._state
            given = self._checked_new(given, len(source), state)
            old = self._slots(given) if self._kind_fits(given) else np.full(len(given), -1)
            if (old >= 0).any() and not upsert:
                held = given[old >= 0][:3].tolist()
                raise SixfoldError(
                    f"ids {held} are in the index already: pass upsert=True to replace their "
                    "vectors, or remove them before"
                )
            state, moved = self._without(state, old[old >= 0])
            state = _counted(state, prepared(source.sample(SAMPLE), self.metric), len(source))
            left = len(source)
            for rows, part in source.blocks(given):
                state = self._appended(state, prepared(rows, self.metric), part, left)
                left -= len(rows)
            self._replace(state, moved, added=given)
        return given

    def remove(self, ids: Any) -> None:
        """Remove the vectors of these ids; all of them or, where one is not there, none.

        Raises:
            OutOfRangeError: An id is not in the index, or is given twice.
        """
        wanted = checked_ids(ids)
        with self._lock:
            slots = self._known_slots(wanted)
            if again := repeated(wanted):
                raise OutOfRangeError(f"ids: {again} are given more than once")
            self._replace(*self._without(self._state, slots), removed=wanted)

    @outside_autocast
    @torch.no_grad()
    def search(self, queries: Any, k: int = 10, *, filter: Any = None) -> Neighbors:
        """The `k` vectors of highest score for each query.

        What a query finds depends neither on other queries nor on threads, and is what a filter
        would leave of a longer answer.

        Args:
            queries: [n, dim], or [dim] for one: like the vectors of `add`.
            k: How many are wanted of each.
            filter: Ids of vectors that may be found; ids that are not in the index are ignored. By
                default all.

        Returns:
            Scores and ids, [n, k], or [k] for one query. Where fewer vectors are held or allowed
            the last scores are -inf, and their ids -1 (None of strings).

        Raises:
            ShapeError: Queries are not [n, dim].
            SixfoldError: They are not finite, or another argument is none of its kind.
        """
        k = whole("k", k, 1, 2**31 - 1)
        source = _Rows("queries", queries, self.dim)
        asked = source.everything(self.metric)
        state, allowed = self._state, None
        if filter is not None:
            with self._lock:
                state = self._state
                allowed = self._allowed(checked_ids(filter, "filter"), state)
        found = [
            self._search(state, prepared(rows, self.metric), k, allowed)
            for rows in asked.split(QUERY_BLOCK)
        ]
        if len(found) == 1 and not source.single:
            return Neighbors(*found[0])
        scores = np.concatenate([more for more, _ in found])
        ids = np.concatenate([own for _, own in found])
        return Neighbors(scores[0], ids[0]) if source.single else Neighbors(scores, ids)

    @outside_autocast
    @torch.no_grad()
    def decode(self, ids: Any) -> np.ndarray:
        """The vectors of these ids as the index knows them, float32 [n, dim].

        Those of cosines have a length of about 1.

        Raises:
            OutOfRangeError: An id is not in the index.
        """
        wanted = checked_ids(ids)
        with self._lock:
            slots, segments = self._known_slots(wanted), self._state.segments
        out = np.empty((len(wanted), self.dim), dtype=np.float32)
        for number, segment in enumerate(segments):
            own = slots // PLACES == number
            if own.any():
                out[own] = segment.decode(slots[own] % PLACES).numpy()
        return out

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index to a file, in one step: `path` is the old file or the new one, whole.

        Raises:
            OSError: It cannot be written.
        """
        # Nobody adds meanwhile: the memory of the last page is the same.
        with self._lock:
            state = self._state
            held = state.segments, state.next_id, state.count, state.total, state.strings
            save_index(path, (self.dim, self.bits, self.metric, self.seed), FileState(*held))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read an index that `save` wrote.

        Raises:
            FormatError: The file holds no index, or is damaged.
            OSError: It cannot be read.
        """
        (dim, bits, metric, seed), loaded = load_index(path)
        index = cls(dim, bits, metric, seed=seed)
        index._state = State(
            loaded.segments, loaded.total, loaded.count, loaded.next_id, loaded.strings
        )
        return index

    def _search(
        self, state: State, queries: Tensor, k: int, allowed: list[np.ndarray] | None
    ) -> tuple[np.ndarray, np.ndarray]:
        none, kind = (None, object) if state.strings else (-1, np.int64)
        found: list[tuple[np.ndarray, np.ndarray]] = []
        for number, segment in enumerate(state.segments):
            bits = segment.allowed if allowed is None else segment.allowed & allowed[number]
            more, slots = (x.numpy() for x in segment.search(queries, k, bits))
            own = segment.ids[slots]
            own[slots < 0] = none
            found.append((more, own))
        absent = k - sum(more.shape[1] for more, _ in found)
        if absent > 0:
            rest = len(queries), absent
            nothing = np.full(rest, -np.inf, dtype=np.float32), np.full(rest, none, dtype=kind)
            found.append(nothing)
        if len(found) == 1:
            return found[0]
        scores = np.concatenate([more for more, _ in found], 1)
        ids = np.concatenate([own for _, own in found], 1)
        # Those that were added first come first among equals.
        order = np.argsort(-scores, 1, kind="stable")[:, :k]
        return np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)

    def _allowed(self, ids: Ids, state: State) -> list[np.ndarray]:
        """Bitmaps of these ids, those of a segment each."""
        slots = self._slots(ids) if self._kind_fits(ids) else np.full(len(ids), -1)
        slots = slots[slots >= 0]
        return [
            bitmap(slots[slots // PLACES == number] % PLACES, len(segment.allowed))
            for number, segment in enumerate(state.segments)
        ]

    def _checked_new(self, ids: Ids | None, count: int, state: State) -> Ids:
        if ids is None:
            if state.strings:
                raise SixfoldError("ids of this index are strings: pass one for each vector")
            if state.next_id + count >= 2**63:
                raise SixfoldError("no numbers are left for ids: pass ids")
            return np.arange(state.next_id, state.next_id + count, dtype=np.int64)
        if len(ids) != count:
            raise ShapeError(f"expected an id for each of {count} vectors, got {len(ids)}")
        if state.strings is not None and len(ids) and state.strings != (ids.dtype == object):
            kinds = ("whole numbers", "strings")
            raise SixfoldError(
                f"ids of this index are {kinds[state.strings]}, got {kinds[not state.strings]}"
            )
        if again := repeated(ids):
            raise SixfoldError(f"ids: {again} are given more than once")
        return ids

    def _appended(self, state: State, x: Tensor, ids: Ids, coming: int) -> State:
        """The state with more vectors, the first of `coming`.

        They are in its last segment and, if they do not fit, in one more, with room for the rest.
        """
        segments = list(state.segments)
        done = 0
        while done < len(x):
            if not segments or segments[-1].room == 0:
                capacity = least_capacity(state.live, coming - done)
                kind = np.dtype(object if ids.dtype == object else np.int64)
                assert state.total is not None
                mean = mean_of(state.total, state.count)
                segments.append(Segment.allocate(self._coder, self.metric, mean, capacity, kind))
            stop = min(len(x), done + segments[-1].room)
            segments[-1] = segments[-1].append(x[done:stop], ids[done:stop])
            done = stop
        next_id = state.next_id
        if len(ids) and ids.dtype != object:
            next_id = max(next_id, min(int(ids.max()) + 1, 2**63 - 1))
        strings = state.strings if not len(ids) else ids.dtype == object
        return State(tuple(segments), state.total, state.count, next_id, strings)

    def _without(self, state: State, slots: np.ndarray) -> tuple[State, bool]:
        """The state without the vectors in these slots, and whether others have moved."""
        if not len(slots):
            return state, False
        segments, moved = [], False
        for number, segment in enumerate(state.segments):
            own = slots[slots // PLACES == number] % PLACES
            left = segment.without(own) if len(own) else segment
            if len(own) and left.live < LEAST_LIVE * left.used:
                left, moved = left.compacted(), True
            if left.live:
                segments.append(left)
        return dataclasses.replace(state, segments=tuple(segments)), moved

    def _replace(
        self, state: State, moved: bool, removed: Ids | None = None, added: Ids | None = None
    ) -> None:
        """Take a new state, whose last vectors are those that were added."""
        table = self._current_table()
        # Interrupted, the table is not that of the state, and is made again when it is needed.
        self._table = State(), table
        self._state = state
        if moved:
            return
        if removed is not None:
            table.remove(removed)
        if added is not None:
            table.put(added, _last_slots(state, len(added)))
        self._table = state, table

    def _current_table(self) -> IdTable:
        state, table = self._table
        if state is not self._state:
            table = _table_of(self._state)
            self._table = self._state, table
        return table

    def _slots(self, ids: Ids) -> np.ndarray:
        return self._current_table().find(ids)

    def _known_slots(self, ids: Ids) -> np.ndarray:
        slots = self._slots(ids) if self._kind_fits(ids) else np.full(len(ids), -1)
        if absent := missing(ids, slots):
            raise OutOfRangeError(f"ids {absent} are not in the index")
        return slots

    def _kind_fits(self, ids: Ids) -> bool:
        strings = self._state.strings
        return strings is None or not len(ids) or strings == (ids.dtype == object)


def _counted(state: State, sample: Tensor, count: int) -> State:
    """The state with the sum of `count` more vectors, estimated from some of them."""
    if not count:
        return state
    total = sample.mean(0).double() * count
    total = total if state.total is None else state.total + total
    return dataclasses.replace(state, total=total, count=state.count + count)


def _last_slots(state: State, count: int) -> np.ndarray:
    """Slots of the vectors that were added last."""
    found, left = [np.empty(0, dtype=np.int64)], count
    for number in reversed(range(len(state.segments))):
        own = min(left, state.segments[number].used)
        stop = state.segments[number].used + number * PLACES
        found.insert(0, np.arange(stop - own, stop))
        left -= own
    return np.concatenate(found)


def _table_of(state: State) -> IdTable:
    table = IdTable()
    for number, segment in enumerate(state.segments):
        slots = segment.live_slots()
        table.put(segment.ids[slots], slots + number * PLACES)
    return table


class _Rows:
    """Vectors in any form, read piece by piece as float32."""

    def __init__(self, name: str, given: Any, dim: int) -> None:
        self.name, self._dim = name, dim
        if not isinstance(given, Tensor | np.ndarray):
            try:
                given = np.asarray(given)
            except ValueError:
                given = np.asarray(None)
        if given.ndim not in (1, 2) or given.shape[-1] != dim:
            raise ShapeError(f"{name}: expected [n, {dim}] or [{dim}], got {list(given.shape)}")
        self.single = given.ndim == 1
        self._given = given[None] if self.single else given
        # Once, before anything is done: `blocks` would meet it in the middle.
        if len(self._given) > BLOCK:
            self._block(0, 0)

    def __len__(self) -> int:
        return len(self._given)

    def blocks(self, ids: Ids | None, size: int = BLOCK) -> Iterator[tuple[Tensor, Any]]:
        """Pieces and their ids; at least one."""
        for start in range(0, max(len(self), 1), size):
            part = None if ids is None else ids[start : start + size]
            yield self._block(start, start + size), part

    def sample(self, most: int) -> Tensor:
        """Some of the vectors, evenly spread."""
        return self._float(self._given[:: max(1, -(-len(self) // most))])

    def check_finite(self, metric: Metric) -> None:
        """Refuse numbers that are not finite, or whose squares are not.

        Raises:
            SixfoldError: There are such.
        """
        for rows, _ in self.blocks(None):
            self._check(rows, metric)

    def everything(self, metric: Metric) -> Tensor:
        """All of them at once, checked as `check_finite` does."""
        rows = self._float(self._given)
        self._check(rows, metric)
        return rows

    def _check(self, rows: Tensor, metric: Metric) -> None:
        if not rows.numel():
            return
        # Of NaN, NaN.
        most = max(map(abs, map(float, rows.aminmax())))
        bounded = most < (torch.inf if metric == "cosine" else 1e18 / self._dim)
        if not bounded:
            raise SixfoldError(
                f"{self.name} must be finite numbers (below 1e18/dim but for cosines), got "
                f"{'NaN' if most != most else most}"
            )

    def _block(self, start: int, stop: int) -> Tensor:
        return self._float(self._given[start:stop])

    def _float(self, part: Any) -> Tensor:
        if isinstance(part, np.ndarray):
            if part.dtype.kind not in "fiub":
                raise SixfoldError(f"{self.name} must be numbers, got {shown(part.dtype)}")
            part = np.ascontiguousarray(part, dtype=np.float32)
            # PyTorch wants to be able to write to it.
            part = torch.from_numpy(part if part.flags.writeable else part.copy())
        if part.is_complex() or part.is_sparse or part.is_nested or part.is_quantized:
            raise SixfoldError(f"{self.name} must be dense real numbers, got {part.dtype}")
        plain: Tensor = part.detach().to("cpu", torch.float32).contiguous()
        return plain
