"""A vector index that holds codes and nothing else."""

import dataclasses
import os
import threading
import warnings
import weakref
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple, NoReturn, Self, get_args

import numpy as np
import torch
from torch import Tensor

from sixfold._surroundings import outside_autocast, outside_inference_mode, untraced
from sixfold.arguments import MOST_SEED, choice, flag, whole
from sixfold.errors import OutOfRangeError, ShapeError, SixfoldError
from sixfold.index.code import BITS, MOST_DIM, MOST_FITTED, NOTICED, VectorCode
from sixfold.index.files import load_index, save_index
from sixfold.index.ids import Ids, IdTable, checked_filter, checked_ids, missing, repeated
from sixfold.index.lists import MOST_LISTS, usual_lists
from sixfold.index.metric import Metric
from sixfold.index.refine import Originals, candidates, reader, refined
from sixfold.index.rows import Rows
from sixfold.index.sample import SAMPLE, calibration_sample
from sixfold.index.segment import bitmap
from sixfold.index.state import PLACES, State

# Queries that are searched for at a time.
QUERY_BLOCK = 1024
MOST_FOUND = 2**24


class Neighbors(NamedTuple):
    """What a search found.

    Attributes:
        scores: float32 [queries, k], descending; -inf where the index has no more vectors.
        ids: int64 [queries, k], -1 there; strings as objects, None there.
    """

    scores: np.ndarray
    ids: np.ndarray


class Index:
    """Nearest neighbours among vectors of which 1 to 8 bits a coordinate are held.

    No training: vectors can be searched for as soon as they are added, and may be added one by one.
    Any number of threads may search while one changes the index: each search sees it as it was when
    it began. Everything is on the CPU.

    Source: arXiv:2504.19874; scales that make inner products unbiased from arXiv:2108.08842 (EDEN);
        subtracting the mean from vectors and queries, as RaBitQ does (arXiv:2405.12497).
    """

    def __init__(
        self, dim: int, bits: int = 4, metric: Metric = "cosine", *, seed: int = 0
    ) -> None:
        """An empty index.

        Args:
            dim: Coordinates of a vector.
            bits: 1, 2, 3, 4 or 8 a coordinate.
            metric: `"cosine"`, `"ip"` (inner product) or `"l2"`, for which a score is the negative
                squared distance: the highest score is always the best.
            seed: Of the random rotation.

        Raises:
            SixfoldError: An argument has none of these values.
        """
        code = VectorCode.plain(
            whole("dim", dim, 1, MOST_DIM),
            choice("bits", bits, BITS),
            whole("seed", seed, 0, MOST_SEED - 1),
        )
        self._state = State(code, choice("metric", metric, get_args(Metric)))
        self._unseen: Tensor | None = None
        self._begin()
        # By number: subclasses may say when two are equal.
        _indexes[id(self)] = weakref.ref(self, partial(_indexes.pop, id(self)))

    def _begin(self) -> None:
        # Held for a whole change; the other for as long as the table is read or changed.
        self._changes, self._reads = threading.RLock(), threading.RLock()
        # Made again from the state whenever it is not that state's: after an interrupt, say.
        self._table: tuple[State | None, IdTable] = None, IdTable()

    @property
    def dim(self) -> int:
        """Coordinates of a vector."""
        return self._state.code.dim

    @property
    def bits(self) -> int:
        """Bits a coordinate."""
        return self._state.code.bits

    @property
    def metric(self) -> Metric:
        """What scores are."""
        return self._state.metric

    @property
    def seed(self) -> int:
        """Of the random rotation."""
        return self._state.code.seed

    def __len__(self) -> int:
        """Vectors held."""
        return self._state.live

    def __contains__(self, id: Any) -> bool:
        """Whether there is a vector of this id."""
        try:
            ids = checked_ids([id])
        except SixfoldError:
            return False
        return bool(self._find(ids)[1][0] >= 0)

    def __repr__(self) -> str:
        """What it is, in a line."""
        held = f"{len(self):,} vectors of {self.dim} coordinates, {self.bits} bits"
        return f"Index({held}, {self.metric}, {self.nbytes / 1e6:,.1f} MB)"

    def __copy__(self) -> "Index":
        """An index of its own with the same vectors, whose memory is shared until it is changed."""
        return self._of(self._state.closed())

    def __deepcopy__(self, memo: Any) -> "Index":
        return self.__copy__()

    def __reduce__(self) -> NoReturn:
        raise SixfoldError(
            "an index is not pickled: save it to a file, and load that where it is needed"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all vectors held, with their ids; removed ones count until they are cleared."""
        state, (known, table) = self._state, self._table
        table = table if known is state else state.table()
        held = sum(segment.nbytes for segment in state.segments)
        held += 0 if state.lists is None else state.lists.nbytes
        return held + table.nbytes + state.code.nbytes

    @property
    def ids(self) -> np.ndarray:
        """The ids of all vectors held, in the order in which they were added, or of lists."""
        found = [s.ids[s.live_slots()] for s in self._state.segments]
        return np.concatenate(found) if found else np.empty(0, dtype=np.int64)

    @untraced
    @outside_autocast
    @outside_inference_mode
    @torch.no_grad()
    def calibrate(self, sample: Any) -> None:
        """Fit the codes to vectors like those to come: more is found with as many bytes.

        Directions in which the sample varies much get more bits, others fewer or none. So vectors
        that vary in other directions are found less well than without: `add` warns of them.
        2,048 vectors chosen at random are enough for 384 coordinates, a few times `dim` for more.
        Of fewer than that less is learned, and nothing is lost.

        Args:
            sample: [n, dim], like the vectors of `add`: at least 256 different ones, of cosines in
                different directions. None is added; of very many 8,192 are looked at.

        Raises:
            ShapeError: They are not [n, dim].
            SixfoldError: They are too few, not finite, or much farther from 0 than from each other;
                the index holds vectors already, or more than 8,192 coordinates a vector.
        """
        if self.dim > MOST_FITTED:
            raise SixfoldError(f"calibrate takes at most {MOST_FITTED} coordinates, got {self.dim}")
        rows = calibration_sample(sample, self.dim, self.metric)
        code = VectorCode.fitted(rows, self.bits, self.seed)
        with self._alone():
            if self._state.live:
                raise SixfoldError(
                    f"the index holds {self._state.live} vectors, whose codes stay as they are: "
                    "calibrate one without any, then add them"
                )
            self._unseen = None
            self._state = dataclasses.replace(self._state, code=code, lists=None)

    @property
    def calibrated(self) -> bool:
        """Whether the codes were fitted to a sample: not where that promised little."""
        return self._state.code.basis is not None

    @untraced
    @outside_autocast
    @outside_inference_mode
    @torch.no_grad()
    def add(self, vectors: Any, ids: Any = None, *, upsert: bool = False) -> np.ndarray:
        """Add vectors; all of them or, where one cannot be, none.

        Args:
            vectors: [n, dim], or [dim] for one: a numpy array (a memory map is read piece by
                piece), a torch tensor or nested lists, of finite numbers.
            ids: One for each: whole numbers of 64 bits, or strings; an index holds one kind. By
                default the numbers from 0 on, or from the largest id that was ever held.
            upsert: Replace vectors whose ids are held already, which is an error otherwise.

        Returns:
            The ids.

        Raises:
            ShapeError: Vectors are not [n, dim], or there is not one id for each.
            SixfoldError: Vectors are not finite, ids occur twice or are held already; or the index
                is being changed by what this call interrupted.
        """
        source = Rows("vectors", vectors, self.dim)
        upsert = flag("upsert", upsert)
        given = None if ids is None else checked_ids(ids)
        source.check_finite(self.metric)
        with self._alone():
            given = self._checked_new(given, len(source))
            _, slots = self._find(given)
            old = slots[slots >= 0]
            if len(old) and not upsert:
                held = given[slots >= 0][:3].tolist()
                raise SixfoldError(
                    f"ids {held} are in the index already: pass upsert=True to replace their "
                    "vectors, or remove them before"
                )
            state, moved = self._state.without(old)
            sample = state.prepared(source.sample(SAMPLE))
            if unlike := self._unlike(sample):
                warnings.warn(unlike, stacklevel=6)
            state = state.expecting(sample, len(source))
            left = len(source)
            for rows, part in source.blocks(given):
                state = state.added(state.prepared(rows), part, left)
                left -= len(rows)
            self._replace(state, moved, added=given)
        return given

    @outside_inference_mode
    @torch.no_grad()
    @untraced
    def remove(self, ids: Any) -> None:
        """Remove the vectors of these ids; all of them or, where one is not there, none.

        Raises:
            OutOfRangeError: An id is not in the index, or is given twice.
        """
        wanted = checked_ids(ids)
        with self._alone():
            _, slots = self._known_slots(wanted)
            if again := repeated(wanted):
                raise OutOfRangeError(f"ids: {again} are given more than once")
            self._replace(*self._state.without(slots), removed=wanted)

    @untraced
    @outside_autocast
    @outside_inference_mode
    @torch.no_grad()
    def partition(self, lists: int | None = None) -> None:
        """Put vectors that lie together into lists: `search(probes=)` looks at some of them.

        For millions of vectors. Codes stay as they are, in the order of lists: the same is found
        without `probes`. Vectors that are added later are in no list and are looked at by every
        search: partition again when they are many.

        Args:
            lists: How many; by default the square root of the number of vectors.

        Raises:
            SixfoldError: The index holds no vectors, or fewer than that.
        """
        if lists is not None:
            lists = whole("lists", lists, 1, MOST_LISTS)
        with self._alone():
            held = self._state.live
            if not held:
                raise SixfoldError("the index holds no vectors: add them, then partition it")
            if lists is not None and lists > held:
                raise SixfoldError(f"lists must be at most the {held} vectors held, got {lists}")
            count = usual_lists(held) if lists is None else lists
            self._replace(self._state.partitioned(count), moved=True)

    @property
    def lists(self) -> int:
        """Lists that vectors lie in: 0 where the index is not partitioned."""
        centroids = self._state.lists
        return 0 if centroids is None else centroids.live

    @untraced
    @outside_autocast
    @outside_inference_mode
    @torch.no_grad()
    def search(
        self,
        queries: Any,
        k: int = 10,
        *,
        filter: Any = None,
        refine: Originals = None,
        probes: int | None = None,
    ) -> Neighbors:
        """The `k` vectors of highest score for each query.

        What a query finds depends neither on other queries nor on threads, and is what a filter
        would leave of a longer answer.

        Args:
            queries: [n, dim], or [dim] for one: like the vectors of `add`.
            k: How many are wanted of each, at most 2**24.
            filter: Ids of vectors that may be found, or an array of True and False of which number
                i says whether id i may; ids that are not in the index are ignored. By default all.
            refine: The vectors themselves, wherever they are kept: an array (a memory map, say)
                whose row i is the vector of the number i as an id, or a function that is called
                with an array of ids and returns their vectors. A few times as many vectors as
                wanted are ranked by their exact scores then, which are returned.
            probes: How many lists are looked at, those whose centroids have the highest scores
                (see `partition`), beside the vectors that are in none. By default all: what others
                hold is not found.

        Returns:
            Scores and ids, [n, k], or [k] for one query. Where fewer vectors are held or allowed
            the last scores are -inf, and their ids -1 (None of strings).

        Raises:
            ShapeError: Queries are not [n, dim].
            SixfoldError: They are not finite, or another argument is none of its kind.
            OutOfRangeError: `refine` has no row for an id that was found.
        """
        k = whole("k", k, 1, MOST_FOUND)
        read = None if refine is None else reader(refine, self.dim)
        source = Rows("queries", queries, self.dim)
        asked = source.everything(self.metric)
        if probes is not None:
            probes = whole("probes", probes, 1, MOST_LISTS)
        state, allowed = self._state, None
        if filter is not None:
            state, slots = self._find(checked_filter(filter))
            allowed = _bitmaps(state, slots[slots >= 0])
        if probes is not None and state.lists is None:
            raise SixfoldError("probes: the index has no lists; call partition() before")
        wanted = k if read is None else max(k, min(candidates(k, self.bits), state.live))
        found = []
        for rows in asked.split(QUERY_BLOCK):
            # In float64, where sums do not depend on how many queries there are.
            own = _search(state, state.prepared(rows.double()), wanted, allowed, probes)
            found.append(own if read is None else refined(rows, *own, k, read, self.metric))
        if len(found) == 1 and not source.single:
            return Neighbors(*found[0])
        scores = np.concatenate([more for more, _ in found])
        ids = np.concatenate([own for _, own in found])
        return Neighbors(scores[0], ids[0]) if source.single else Neighbors(scores, ids)

    @untraced
    @outside_autocast
    @outside_inference_mode
    @torch.no_grad()
    def decode(self, ids: Any) -> np.ndarray:
        """The vectors of these ids as the index knows them, float32 [n, dim].

        Those of cosines have a length of about 1.

        Raises:
            OutOfRangeError: An id is not in the index.
        """
        wanted = checked_ids(ids)
        state, slots = self._known_slots(wanted)
        out = np.empty((len(wanted), self.dim), dtype=np.float32)
        for number, segment in enumerate(state.segments):
            own = slots // PLACES == number
            if own.any():
                out[own] = segment.decode(slots[own] % PLACES).numpy()
        return out

    @untraced
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index to a file, in one step: `path` is the old file or the new one, whole.

        Raises:
            OSError: It cannot be written.
        """
        # Nobody adds meanwhile: the memory of the last page is the same.
        with self._alone():
            save_index(path, self._state)

    @classmethod
    @untraced
    @outside_inference_mode
    def load(cls, path: str | os.PathLike[str], *, mmap: bool = False) -> Self:
        """Read an index that `save` wrote.

        Args:
            path: Of the file.
            mmap: Map codes instead of reading them: processes that map one file share its memory.
                Nobody may cut it or write to it meanwhile; `save` does neither, it puts another
                file in its place. Adding vectors copies the codes of the part they are added to.

        Raises:
            FormatError: The file holds no index, or is damaged.
            OSError: It cannot be read.
        """
        return cls._of(load_index(path, flag("mmap", mmap))[0])

    @classmethod
    def _of(cls, state: State) -> Self:
        code = state.code
        index = cls(code.dim, code.bits, state.metric, seed=code.seed)
        index._state = state
        return index

    def _alone(self) -> AbstractContextManager[Any]:
        """For `with`, around a change: one at a time, and none within another."""
        return self._free(self._changes)

    def _free(self, lock: Any) -> AbstractContextManager[Any]:
        """For `with`: one thread at a time, and nothing within what it does.

        The lock itself, whose acquisition no signal can separate from the block that it begins.

        Raises:
            SixfoldError: Code that an operation of this thread calls, or a signal handler that
                interrupts it, uses the index.
        """
        if lock._is_owned():
            raise SixfoldError(
                "the index is in use by what this call interrupted: a signal handler, or a "
                "method of an argument, may search without a filter and nothing else"
            )
        held: AbstractContextManager[Any] = lock
        return held

    def _unlike(self, sample: Tensor) -> str | None:
        """Why vectors are found less well than without calibration: asked of enough at once."""
        code = self._state.code
        if code.basis is None:
            return None
        rows = sample if self._unseen is None else torch.cat([self._unseen, sample])
        self._unseen = None if len(rows) >= NOTICED else rows
        return code.unlike(rows) if len(rows) >= NOTICED else None

    def _checked_new(self, ids: Ids | None, count: int) -> Ids:
        state = self._state
        if ids is None:
            if state.strings:
                raise SixfoldError("ids of this index are strings: pass one for each vector")
            if state.next_id + count >= 2**63:
                raise SixfoldError("no numbers are left for ids: pass ids")
            return np.arange(state.next_id, state.next_id + count, dtype=np.int64)
        if len(ids) != count:
            raise ShapeError(f"expected an id for each of {count} vectors, got {len(ids)}")
        if len(ids) and not self._kind_fits(ids):
            kinds = ("whole numbers", "strings")
            theirs = bool(state.strings)
            raise SixfoldError(f"ids of this index are {kinds[theirs]}, got {kinds[not theirs]}")
        if again := repeated(ids):
            raise SixfoldError(f"ids: {again} are given more than once")
        return ids

    def _replace(
        self, state: State, moved: bool, removed: Ids | None = None, added: Ids | None = None
    ) -> None:
        """Take a new state, whose last vectors are those that were added."""
        with self._free(self._reads):
            table = self._current_table()
            # Interrupted, the table is not that of the state, and is made again when it is needed.
            self._table = None, table
            self._state = state
            if moved:
                return
            if removed is not None:
                table.remove(removed)
            if added is not None:
                table.put(added, state.last_slots(len(added)))
            self._table = state, table

    def _current_table(self) -> IdTable:
        state, table = self._table
        if state is not self._state:
            table = self._state.table()
            self._table = self._state, table
        return table

    def _find(self, ids: Ids) -> tuple[State, np.ndarray]:
        """The slot of each id, -1 where there is none, and the state that has them there."""
        with self._free(self._reads):
            if not self._kind_fits(ids):
                return self._state, np.full(len(ids), -1, dtype=np.int64)
            return self._state, self._current_table().find(ids)

    def _known_slots(self, ids: Ids) -> tuple[State, np.ndarray]:
        state, slots = self._find(ids)
        if absent := missing(ids, slots):
            raise OutOfRangeError(f"ids {absent} are not in the index")
        return state, slots

    def _kind_fits(self, ids: Ids) -> bool:
        strings = self._state.strings
        return strings is None or strings == (ids.dtype == object)


def _search(
    state: State,
    queries: Tensor,
    k: int,
    allowed: list[np.ndarray] | None,
    probes: int | None,
) -> tuple[np.ndarray, np.ndarray]:
    lists = None
    if probes is not None and state.lists is not None and probes < state.lists.live:
        _, lists = state.lists.search(queries, probes, state.lists.allowed)
    none, kind = (None, object) if state.strings else (-1, np.int64)
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for number, segment in enumerate(state.segments):
        bits = segment.allowed if allowed is None else segment.allowed & allowed[number]
        more, slots = (x.numpy() for x in segment.search(queries, k, bits, lists))
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


def _bitmaps(state: State, slots: np.ndarray) -> list[np.ndarray]:
    """Bitmaps of these slots, those of a segment each."""
    return [
        bitmap(slots[slots // PLACES == number] % PLACES, len(segment.allowed))
        for number, segment in enumerate(state.segments)
    ]


# A child process has locks of its own: a thread that the fork left behind may hold the others.
# No WeakSet: what it runs when an index goes is Python, in which a signal handler may raise, and
# what is raised there is lost.
_indexes: dict[int, weakref.ref[Index]] = {}


def _begin_all() -> None:
    for living in list(_indexes.values()):
        index = living()
        if index is not None:
            index._begin()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_all)
