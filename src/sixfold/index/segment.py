"""Vectors that were added one after another: codes in pages of 64, with one mean."""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple, Self

import numpy as np
import torch
from jaxtyping import Float, Float16, Float32, Int64, UInt8
from torch import Tensor

from sixfold.cache.coder import Coder
from sixfold.cache.memory import empty
from sixfold.codebooks import expected_mse
from sixfold.index.code import CPU, VectorCode
from sixfold.index.metric import Metric, asked, offset_dtype, offsets
from sixfold.kernels import decode as decoding
from sixfold.kernels.encode import encode_pages
from sixfold.kernels.nearest import nearest
from sixfold.kernels.types import Coding, KeyMap, VectorPages, VectorPart
from sixfold.packing import PAGE_TOKENS, from_pages, key_rows, to_pages

# A mean is fitted again whenever twice as many vectors are there, until it is of so many.
LEARNED = 1024
# Pages that are taken apart and put together at a time.
SOME_PAGES = 256
# The bits of a page.
ALL = np.uint64(2**64 - 1)


@dataclasses.dataclass(frozen=True)
class Segment:
    """A snapshot: what is added or removed later is in other ones, which may share its memory.

    Attributes:
        code: How vectors are coded, which are here in its basis.
        metric: What scores are.
        mean: What was subtracted from all vectors.
        codes: Of each group of coordinates, in the key layout.
        scales: Likewise, of each vector.
        offsets: What each adds to its scores.
        ids: Of each vector.
        allowed: Which of them count: see `VectorPages`. Not written to once it is here.
        used: Vectors that were added, removed ones included.
        live: Those that were not.
        raw: All of them uncompressed, while the mean is fitted to few.
        fitted: To how many it is.
        bounds: Slots where the vectors of each list begin, and where the last ends: vectors in the
            order of lists, to which none are added. None: in the order in which they came.
    """

    code: VectorCode
    metric: Metric
    mean: Float32[Tensor, " dim"]
    codes: tuple[UInt8[Tensor, "pages page_bytes"], ...]
    scales: tuple[Float16[Tensor, "pages page"], ...]
    offsets: Float[Tensor, "pages page"]
    ids: np.ndarray
    allowed: np.ndarray
    used: int = 0
    live: int = 0
    raw: Float32[Tensor, "used dim"] | None = None
    fitted: int = LEARNED
    bounds: Int64[np.ndarray, " ends"] | None = None

    @classmethod
    def joined(cls, segments: Sequence[Self]) -> Self:
        """One segment of the vectors of some that have one mean, which is fitted for good."""
        (first, *others), ids = segments, []
        if not others:
            return first
        for one in segments:
            unused = np.empty(one.pages * PAGE_TOKENS - one.used, dtype=one.ids.dtype)
            ids += [one.ids[: one.used], unused]

        def pages(*tensors: Tensor) -> Tensor:
            return torch.cat([x[: s.pages] for x, s in zip(tensors, segments, strict=True)])

        return dataclasses.replace(
            first,
            codes=tuple(map(pages, *(s.codes for s in segments))),
            scales=tuple(map(pages, *(s.scales for s in segments))),
            offsets=pages(*(s.offsets for s in segments)),
            ids=np.concatenate(ids),
            allowed=np.concatenate([s.allowed[: s.pages] for s in segments]),
            used=sum(s.pages for s in segments) * PAGE_TOKENS,
            live=sum(s.live for s in segments),
            bounds=None,
        )

    @classmethod
    def allocate(
        cls, code: VectorCode, metric: Metric, mean: Tensor, capacity: int, kind: np.dtype
    ) -> Self:
        """Room for `capacity` vectors, or up to 63 more; ids are of the dtype `kind`."""
        pages = -(-capacity // PAGE_TOKENS)
        return cls(
            code,
            metric,
            mean,
            tuple(
                empty(pages, coder.page_bytes, dtype=torch.uint8, device=CPU)
                for coder in code.coders
            ),
            tuple(empty(pages, PAGE_TOKENS, dtype=torch.float16, device=CPU) for _ in code.coders),
            empty(pages, PAGE_TOKENS, dtype=offset_dtype(metric), device=CPU).zero_(),
            np.empty(pages * PAGE_TOKENS, dtype=kind),
            np.zeros(pages, dtype="<u8"),
        )

    @property
    def pages(self) -> int:
        """Pages in use."""
        return -(-self.used // PAGE_TOKENS)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is in use."""
        ids = self.ids[: self.used]
        held = sum(x[: self.pages].nbytes for x in self._tensors) + self.mean.nbytes
        held += 0 if self.raw is None else self.raw.nbytes
        held += 0 if self.bounds is None else self.bounds.nbytes
        return held + ids.nbytes + self.allowed[: self.pages].nbytes

    def live_slots(self) -> Int64[np.ndarray, " live"]:
        """Slots of the vectors that count, in order."""
        bits = np.unpackbits(self.allowed.view(np.uint8), bitorder="little")
        return np.flatnonzero(bits)

    def append(self, x: Float32[Tensor, "n dim"], ids: np.ndarray, coming: int) -> Self:
        """The same with more vectors, the first of `coming`."""
        if self.raw is None:
            return self._with_room(len(x), coming)._written(x, ids)
        raw = torch.cat([self.raw, x])
        if len(raw) >= min(2 * self.fitted, LEARNED):
            every = np.concatenate([self.ids[: self.used], ids])
            return self._fitted(raw.mean(0), raw, every)
        more = self._with_room(len(x), coming)._written(x, ids)
        return dataclasses.replace(more, raw=raw)

    def learned(self, mean: Float32[Tensor, " dim"]) -> Self:
        """The same vectors with this mean, for good; `raw` is there."""
        assert self.raw is not None
        made = self._fitted(mean, self.raw, self.ids[: self.used])
        return dataclasses.replace(made, raw=None, fitted=LEARNED)

    def without(self, slots: Int64[np.ndarray, " removed"]) -> Self:
        """The same without the vectors in these slots, all of which count now."""
        allowed = _with_bits(self.allowed, slots, False)
        return dataclasses.replace(self, allowed=allowed, live=self.live - len(slots))

    def compacted(self) -> Self:
        """The same vectors in memory of their own, as much as they take, in the same order."""
        slots = self.live_slots()
        made = self._arranged(slots)
        if self.bounds is None:
            return made
        return dataclasses.replace(made, bounds=np.searchsorted(slots, self.bounds))

    def partitioned(self, owner: Int64[np.ndarray, " live"], lists: int) -> Self:
        """The same vectors in the order of lists; `owner`: of those that count, in order."""
        order = np.argsort(owner, kind="stable")
        made = self._arranged(self.live_slots()[order])
        ends = np.searchsorted(owner[order], np.arange(lists + 1))
        return dataclasses.replace(made, bounds=ends)

    def _arranged(self, slots: Int64[np.ndarray, " live"]) -> Self:
        """The vectors in these slots, all that count, in this order, in memory of their own."""
        chosen = torch.from_numpy(slots)
        made = self.allocate(self.code, self.metric, self.mean, len(slots), self.ids.dtype)
        step = SOME_PAGES * PAGE_TOKENS
        for start in range(0, len(slots), step):
            part = slots[start : start + step]
            pages = slice(start // PAGE_TOKENS, -(-(start + len(part)) // PAGE_TOKENS))
            for coder, old, new in zip(self.code.coders, self.codes, made.codes, strict=True):
                rows = _rows(old, part, coder)
                rows = torch.nn.functional.pad(rows, (0, 0, 0, -len(part) % PAGE_TOKENS))
                pieces = rows.unflatten(0, (-1, PAGE_TOKENS))
                new[pages] = to_pages(pieces, *coder.coding(CPU).row, "key")
        for old, new in zip(
            (*self.scales, self.offsets), (*made.scales, made.offsets), strict=True
        ):
            new.zero_()
            new.view(-1)[: len(slots)] = old.view(-1)[chosen]
        made.ids[: len(slots)] = self.ids[slots]
        return dataclasses.replace(
            made,
            allowed=_with_bits(made.allowed, np.arange(len(slots)), True),
            used=len(slots),
            live=len(slots),
            raw=None if self.raw is None else self.raw[chosen],
            fitted=self.fitted if self.raw is None else min(self.fitted, len(slots)),
        )

    def closed(self) -> Self:
        """The same, in memory that it does not add to: whatever is added is added to a copy."""
        return dataclasses.replace(self, ids=self.ids[: self.used])

    def search(
        self,
        queries: Float32[Tensor, "nq dim"],
        best: int,
        allowed: np.ndarray,
        lists: Int64[Tensor, "nq probes"] | None = None,
    ) -> tuple[Float32[Tensor, "nq best"], Int64[Tensor, "nq best"]]:
        """Scores and slots of the best, as `kernels.nearest` returns them.

        Args:
            queries: As `metric.prepared` made them.
            best: How many; no more than there are vectors are returned.
            allowed: Which vectors take part, like the attribute.
            lists: Those whose vectors take part, of each query; None: all.
        """
        pages, best = self._whole, min(best, self.live)
        vectors, weights, constants = asked(queries, self.mean, self._square, self.metric)
        rotated = self.code.rotated(vectors)
        if lists is None or self.bounds is None:
            if allowed is not self.allowed:
                pages = pages._replace(allowed=self._bytes(allowed))
            return nearest(rotated, weights, constants, pages, best=best)
        scores = queries.new_empty(len(queries), best)
        slots = torch.empty(len(queries), best, dtype=torch.int64, device=CPU)
        for number, own in enumerate(lists.numpy()):
            one = slice(number, number + 1)
            members = pages._replace(allowed=self._bytes(allowed & self._members(own)))
            alone = rotated[one], weights[one], constants[one]
            scores[one], slots[one] = nearest(*alone, members, best=best)
        return scores, slots

    def _members(self, lists: Int64[np.ndarray, " probes"]) -> np.ndarray:
        """A bitmap of the slots of these lists."""
        assert self.bounds is not None
        (first, begin), (last, end) = (
            np.divmod(self.bounds[lists + side], PAGE_TOKENS) for side in (0, 1)
        )
        head = np.left_shift(ALL, begin.astype(np.uint64))
        tail = np.left_shift(np.uint64(1), end.astype(np.uint64)) - np.uint64(1)
        # One more than there are pages: a list may end where they do.
        members = np.zeros(len(self.allowed) + 1, dtype="<u8")
        wide = last > first
        whole = np.zeros(len(members) + 1, dtype=np.int64)
        np.add.at(whole, first[wide] + 1, 1)
        np.add.at(whole, last[wide], -1)
        members[whole.cumsum()[:-1] > 0] = ALL
        np.bitwise_or.at(members, first[wide], head[wide])
        np.bitwise_or.at(members, last[wide], tail[wide])
        np.bitwise_or.at(members, first[~wide], (head & tail)[~wide])
        return members[:-1]

    def decode(self, slots: Int64[np.ndarray, " n"]) -> Float32[Tensor, "n dim"]:
        """Vectors as codes have them: those of least squared error."""
        return self.code.from_basis(self.decoded(slots))

    def decoded(self, slots: Int64[np.ndarray, " n"]) -> Float32[Tensor, "n dim"]:
        """The same in the basis."""
        chosen, parts = torch.from_numpy(slots), []
        for coder, codes, scales in zip(self.code.coders, self.codes, self.scales, strict=True):
            coding = coder.coding(CPU)
            part = decoding.decode(
                _rows(codes, slots, coder),
                scales.view(-1)[chosen],
                coding.turns,
                coding.factor,
                coding.centroids,
                dim=coding.dim,
                bits=coding.bits,
            )
            # Scales make inner products right on average, for which vectors are too long.
            parts.append(part * (1 - expected_mse(coding.dim, coding.bits)))
        return self.code.joined(parts) + self.mean

    @cached_property
    def _whole(self) -> VectorPages:
        count = self.pages
        parts = [
            VectorPart(codes[:count], scales[:count], coder.coding(CPU))
            for codes, scales, coder in zip(self.codes, self.scales, self.code.coders, strict=True)
        ]
        return VectorPages(parts, self.offsets[:count], self._bytes(self.allowed))

    def _bytes(self, allowed: np.ndarray) -> UInt8[Tensor, "pages bitmap"]:
        count = self.pages
        return torch.from_numpy(allowed[:count].view(np.uint8).reshape(count, -1))

    @cached_property
    def _square(self) -> float:
        return float(self.mean.double().square().sum())

    def _with_room(self, count: int, coming: int) -> Self:
        """The same in memory for `count` more vectors: more than that, for what else will come."""
        if len(self.ids) - self.used >= count:
            return self
        capacity = self.used + max(coming, self.used // 4, LEARNED)
        made = self.allocate(self.code, self.metric, self.mean, capacity, self.ids.dtype)
        pages = self.pages
        for old, new in zip(self._tensors, made._tensors, strict=True):
            new[:pages] = old[:pages]
        made.ids[: self.used] = self.ids[: self.used]
        made.allowed[:pages] = self.allowed[:pages]
        return dataclasses.replace(
            made, used=self.used, live=self.live, raw=self.raw, fitted=self.fitted
        )

    @property
    def _tensors(self) -> tuple[Tensor, ...]:
        return *self.codes, *self.scales, self.offsets

    def _fitted(self, mean: Tensor, raw: Tensor, ids: np.ndarray) -> Self:
        """These vectors, of which the first are those that are here, coded with this mean."""
        made = self.allocate(self.code, self.metric, mean, len(raw) + LEARNED, ids.dtype)
        made = made._written(raw, ids)
        removed = np.setdiff1d(np.arange(self.used), self.live_slots())
        made = made.without(removed)
        kept = None if len(raw) >= LEARNED else raw
        return dataclasses.replace(made, raw=kept, fitted=min(len(raw), LEARNED))

    def _written(self, x: Float32[Tensor, "n dim"], ids: np.ndarray) -> Self:
        """The same with more vectors, for which there is room."""
        first, stop = self.used, self.used + len(x)
        self.offsets.view(-1)[first:stop].copy_(offsets(x, self.mean, self.metric))
        whole = min(-(-first // PAGE_TOKENS) * PAGE_TOKENS, stop)
        if first < whole:
            self._fill_page(x[: whole - first])
        if whole < stop:
            pages = slice(whole // PAGE_TOKENS, -(-stop // PAGE_TOKENS))
            for part, codes, scales in self._parts(x[whole - first :]):
                _encode(part, codes[pages], scales[pages])
        self.ids[first:stop] = ids
        allowed = _with_bits(self.allowed, np.arange(first, stop), True)
        return dataclasses.replace(self, allowed=allowed, used=stop, live=self.live + len(x))

    def _parts(self, x: Float32[Tensor, "n dim"]) -> Iterator[tuple["_Part", Tensor, Tensor]]:
        """What is coded of vectors, and where the codes and scales are."""
        split, means = self.code.split(x), self.code.split(self.mean[None])
        for own, mean, coder, codes, scales in zip(
            split, means, self.code.coders, self.codes, self.scales, strict=True
        ):
            yield _Part(own, mean[0], coder.coding(CPU)), codes, scales

    def _fill_page(self, x: Tensor) -> None:
        """Encode vectors behind those of the last page, whose codes stay as they are."""
        page, place = divmod(self.used, PAGE_TOKENS)
        own, new = slice(page, page + 1), slice(place, place + len(x))
        for part, all_codes, all_scales in self._parts(x):
            codes, scales = all_codes[own].clone(), all_scales[own].clone()
            _encode(part, codes, scales)
            row = part.coding.row
            old = from_pages(all_codes[own], *row, "key")
            old[:, new] = from_pages(codes, *row, "key")[:, : len(x)]
            all_codes[own] = to_pages(old, *row, "key")
            all_scales[page, new] = scales[0, : len(x)]


class _Part(NamedTuple):
    """What of some vectors is coded together."""

    x: Float32[Tensor, "n coded"]
    mean: Float32[Tensor, " coded"]
    coding: Coding


def _encode(part: _Part, codes: Tensor, scales: Tensor) -> None:
    """Encode vectors into pages of their own; the last is filled up with zeros."""
    key_map = KeyMap(part.mean[None, None], torch.ones_like(part.mean)[None, None])
    whole = len(part.x) // PAGE_TOKENS
    rest = part.x[whole * PAGE_TOKENS :]
    rest = torch.nn.functional.pad(rest, (0, 0, 0, -len(rest) % PAGE_TOKENS))
    for x, pages in ((part.x[: whole * PAGE_TOKENS], slice(whole)), (rest, slice(whole, None))):
        if not len(x):
            continue
        slots = torch.arange(len(x) // PAGE_TOKENS, device=CPU)[None]
        written = codes[pages, None], scales[pages, None]
        encode_pages(x[None, None], slots, part.coding, "key", *written, key_map)


def _rows(
    codes: UInt8[Tensor, "pages page_bytes"], slots: Int64[np.ndarray, " n"], coder: Coder
) -> UInt8[Tensor, "n row_bytes"]:
    """Packed codes of single vectors."""
    page, token = (torch.from_numpy(x) for x in np.divmod(slots, PAGE_TOKENS))
    return key_rows(codes, page, token, *coder.coding(CPU).row)


def bitmap(slots: Int64[np.ndarray, " n"], pages: int) -> np.ndarray:
    """Bits of these slots, 64 a page."""
    return _with_bits(np.zeros(pages, dtype="<u8"), slots, True)


def _with_bits(allowed: np.ndarray, slots: np.ndarray, value: bool) -> np.ndarray:
    changed = allowed.copy()
    bits = np.left_shift(np.uint64(1), (slots % PAGE_TOKENS).astype(np.uint64))
    if value:
        np.bitwise_or.at(changed, slots // PAGE_TOKENS, bits)
    else:
        np.bitwise_and.at(changed, slots // PAGE_TOKENS, ~bits)
    return changed
