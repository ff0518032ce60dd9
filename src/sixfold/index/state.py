"""Everything that a search reads, as a value: each change makes another."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from sixfold.index.code import NOTICED, VectorCode
from sixfold.index.ids import Ids, IdTable
from sixfold.index.lists import centroid_segment, fitted_centroids, nearness, owners
from sixfold.index.metric import Metric, prepared
from sixfold.index.segment import LEARNED, Segment

# A slot is a segment's number and a place in it.
PLACES = 2**40
# Each costs every search a little; beyond, means stay as they are.
MOST_SEGMENTS = 64
# Of the vectors of a segment: where fewer are left, those are moved together.
LEAST_LIVE = 3 / 4
# How far a mean may be from that of what comes, squared, of what they spread: errors of codes grow
# by as much.
DRIFT = 0.1
# Of the square of a mean: sums in float32 are not as exact as that.
ROUNDING = 1e-10


@dataclasses.dataclass(frozen=True)
class Recent:
    """What has been added since the mean of the last segment was last compared with it.

    Attributes:
        count: How many vectors.
        total: Sum of their differences from the mean.
        squares: Sum of the squares of those.
        rounding: What is no distance, squared.
    """

    count: int
    total: Float64[Tensor, " dim"]
    squares: float
    rounding: float

    @classmethod
    def of(cls, x: Float32[Tensor, "n dim"], mean: Float32[Tensor, " dim"]) -> "Recent":
        """That of some vectors."""
        moved = x - mean
        rounding = ROUNDING * float(mean.double().square().sum())
        return cls(len(x), moved.sum(0).double(), float(moved.double().square().sum()), rounding)

    def __add__(self, other: "Recent | None") -> "Recent":
        if other is None:
            return self
        total = self.total + other.total
        count, squares = self.count + other.count, self.squares + other.squares
        return Recent(count, total, squares, self.rounding)

    @property
    def drift(self) -> Float32[Tensor, " dim"] | None:
        """How far their mean is from the other, if that is too far."""
        average = self.total / self.count
        far = float(average.square().sum())
        spread = max(self.squares / self.count - far, 0.0)
        return average.float() if far > max(DRIFT * spread, self.rounding) else None


@dataclasses.dataclass(frozen=True)
class State:
    """The vectors of an index.

    Attributes:
        code: How they are coded.
        metric: What scores are.
        segments: Where they are, in the order in which they were added.
        recent: Of those in the last segment.
        mean: Of the next segment, if there is to be one.
        next_id: The next number that is given as an id.
        strings: Whether ids are strings; None as long as there are none.
        lists: Centroids of the lists that vectors lie in, but for those that were added since.
    """

    code: VectorCode
    metric: Metric
    segments: tuple[Segment, ...] = ()
    recent: Recent | None = None
    mean: Float32[Tensor, " dim"] | None = None
    next_id: int = 0
    strings: bool | None = None
    lists: Segment | None = None

    @property
    def live(self) -> int:
        """Vectors held."""
        return sum(segment.live for segment in self.segments)

    def prepared(self, x: Float[Tensor, "n dim"]) -> Float32[Tensor, "n dim"]:
        """Vectors or queries as segments take them."""
        return self.code.in_basis(prepared(x, self.metric))

    def expecting(self, sample: Float32[Tensor, "n dim"], count: int) -> "State":
        """The state before `count` vectors are added that look like these."""
        if count < NOTICED:
            return self
        mean = sample.mean(0)
        if not self.segments:
            return dataclasses.replace(self, mean=mean) if count >= LEARNED else self
        *others, last = self.segments
        elsewhere = Recent.of(sample, last.mean).drift is not None
        if last.raw is not None and (elsewhere or count >= LEARNED):
            total, held = last.raw.sum(0), len(last.raw)
            if not elsewhere:
                total, held = total + mean * count, held + count
            last = last.learned(total / held)
        if not elsewhere:
            return dataclasses.replace(self, segments=(*others, last), mean=None)
        if len(self.segments) < MOST_SEGMENTS:
            return dataclasses.replace(self, segments=(*others, last), mean=mean, recent=None)
        return self

    def added(self, x: Float32[Tensor, "n dim"], ids: Ids, coming: int) -> "State":
        """The state with more vectors, at least one, the first of `coming`."""
        segments, recent, mean = list(self.segments), self.recent, None
        if not segments or self.mean is not None or segments[-1].bounds is not None:
            segments.append(self._opened(x, ids, coming))
            recent = None
        else:
            segments[-1] = segments[-1].append(x, ids, coming)
            # Of many at once the mean was looked at before.
            if segments[-1].raw is None and coming < NOTICED:
                recent = Recent.of(x, segments[-1].mean) + recent
        if recent is not None and recent.count >= NOTICED:
            moved = recent.drift if len(segments) < MOST_SEGMENTS else None
            mean, recent = None if moved is None else segments[-1].mean + moved, None
        next_id = self.next_id
        if ids.dtype != object:
            next_id = max(next_id, min(int(ids.max()) + 1, 2**63 - 1))
        return dataclasses.replace(
            self,
            segments=tuple(segments),
            recent=recent,
            mean=mean,
            next_id=next_id,
            strings=ids.dtype == object,
        )

    def _opened(self, x: Tensor, ids: Ids, coming: int) -> Segment:
        """A segment of these vectors."""
        first = self.mean is None and not self.segments
        mean = self.mean
        if mean is None:
            mean = x.mean(0) if first else self.segments[-1].mean
        capacity = max(coming, self.live // 4, LEARNED)
        kind = np.dtype(object if ids.dtype == object else np.int64)
        made = Segment.allocate(self.code, self.metric, mean, capacity, kind)
        if first and len(x) < LEARNED:
            made = dataclasses.replace(made, raw=x[:0], fitted=0)
        return made.append(x, ids, coming)

    def without(self, slots: Int64[np.ndarray, " removed"]) -> tuple["State", bool]:
        """The state without the vectors in these slots, and whether others have moved."""
        if not len(slots):
            return self, False
        segments, moved = [], False
        for number, segment in enumerate(self.segments):
            own = slots[slots // PLACES == number] % PLACES
            left = segment.without(own) if len(own) else segment
            if not left.live:
                moved = True
                continue
            if len(own) and left.live < LEAST_LIVE * left.used:
                left, moved = left.compacted(), True
            segments.append(left)
        if not segments:
            empty = State(self.code, self.metric, next_id=self.next_id, lists=self.lists)
            return empty, True
        kept = segments[-1].mean is self.segments[-1].mean
        recent, mean = (self.recent, self.mean) if kept else (None, None)
        changed = dataclasses.replace(self, segments=tuple(segments), recent=recent, mean=mean)
        return changed, moved

    def partitioned(self, lists: int) -> "State":
        """The state whose vectors lie in so many lists."""
        segments = _merged(self.segments)
        centroids = fitted_centroids(segments, lists)
        near = centroid_segment(centroids, self.code, nearness(self.metric))
        last = segments.pop() if len(segments) == MOST_SEGMENTS else None
        segments = [x.partitioned(owners(x, near), lists) for x in segments]
        if last is not None:
            # What comes has no segment of its own, but this one.
            segments.append(dataclasses.replace(last, bounds=None))
        held = centroid_segment(centroids, self.code, self.metric)
        return dataclasses.replace(self, segments=tuple(segments), lists=held)

    def closed(self) -> "State":
        """The same, for another index: neither adds to memory of the other."""
        return dataclasses.replace(self, segments=tuple(s.closed() for s in self.segments))

    def last_slots(self, count: int) -> Int64[np.ndarray, " count"]:
        """Slots of the vectors that were added last."""
        found, left = [np.empty(0, dtype=np.int64)], count
        for number in reversed(range(len(self.segments))):
            own = min(left, self.segments[number].used)
            stop = self.segments[number].used + number * PLACES
            found.insert(0, np.arange(stop - own, stop))
            left -= own
        return np.concatenate(found)

    def table(self) -> IdTable:
        """Where each id is."""
        table = IdTable()
        for number, segment in enumerate(self.segments):
            slots = segment.live_slots()
            table.put(segment.ids[slots], slots + number * PLACES)
        return table


def _merged(segments: Sequence[Segment]) -> list[Segment]:
    """One segment for each mean, which stays as it is for good."""
    settled = [dataclasses.replace(x, raw=None, fitted=LEARNED) for x in segments]
    alike: list[list[Segment]] = []
    for one in settled:
        group = next((g for g in alike if torch.equal(g[0].mean, one.mean)), None)
        if group is None:
            alike.append([one])
        else:
            group.append(one)
    return [Segment.joined(group) for group in alike]
