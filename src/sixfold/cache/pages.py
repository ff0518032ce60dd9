"""Pages of codes: storage that grows without moving, and tables that say whose page is where."""

import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, Self

import torch
from jaxtyping import Int, Int64
from torch import Tensor

from sixfold._surroundings import ordinary_tensors
from sixfold.cache.memory import empty
from sixfold.cache.slots import Lease, Slots
from sixfold.kernels.types import Pages, Pool
from sixfold.packing import PAGE_TOKENS

MIN_SLAB_PAGES = 4
GROWTH = 16  # a new slab adds 1/16 of the history: at most 6 % of slack, few slabs
MAX_SLAB_PAGES = 128  # enough for its own cost not to show; below 1 % of a million tokens


@dataclasses.dataclass(eq=False)
class Slab:
    """A fixed piece of storage for pages of keys and values, shared by every cache that uses it.

    Attributes:
        pool: The memory.
        slots: Who uses which, forks of the cache included.
    """

    pool: Pool
    slots: Slots

    @classmethod
    def allocate(
        cls, slots: int, kv_heads: int, key_bytes: int, value_bytes: int, device: torch.device
    ) -> Self:
        """Storage for `slots` pages."""
        codes = partial(empty, slots, kv_heads, dtype=torch.uint8, device=device)
        scales = partial(empty, slots, kv_heads, PAGE_TOKENS, dtype=torch.float16, device=device)
        # Memory from inference mode could not be written to outside of it.
        with ordinary_tensors():
            pool = Pool(codes(key_bytes), scales(), codes(value_bytes), scales())
            return cls(pool, Slots(slots))

    @classmethod
    def full(cls, tensors: Sequence[Tensor]) -> Self:
        """A slab with every slot in use, of the tensors of a pool."""
        pool = Pool(*tensors)
        count = len(pool.key_codes)
        return cls(pool, Slots(count, used=count))

    @property
    def page_shape(self) -> tuple[int, int, int]:
        """KV heads, and bytes of one head's key codes and value codes of a page."""
        keys, _, values, _ = self.pool
        return keys.shape[1], keys.shape[2], values.shape[2]


@dataclasses.dataclass(eq=False)
class Run:
    """Consecutive pages of every sequence that lie in one slab. Never changed, only replaced.

    Attributes:
        slab: Where the pages are.
        lease: Which they are, and that they are in use.
        lengths: Valid tokens of each page.
        tokens: Their sum.
        starts: Each page's first token, counted from the run's first.
    """

    slab: Slab
    lease: Lease
    lengths: Int64[Tensor, " pages"]
    tokens: int
    starts: Int64[Tensor, " pages"]

    @classmethod
    def of(
        cls, slab: Slab, slots: Int64[Tensor, "batch pages"], lengths: Int64[Tensor, " pages"]
    ) -> Self:
        """A run of pages of these lengths, which are another run's or nobody else's."""
        return cls.leased(slab, slab.slots.hold(slots), lengths)

    @classmethod
    def leased(cls, slab: Slab, lease: Lease, lengths: Int64[Tensor, " pages"]) -> Self:
        """A run of leased pages of these lengths."""
        ends = lengths.cumsum(0)
        return cls(slab, lease, lengths, int(ends[-1]) if len(ends) else 0, ends - lengths)

    @property
    def slots(self) -> Int64[Tensor, "batch pages"]:
        """Where in the slab each sequence's pages are."""
        return self.lease.slots

    def valid(self, vectors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Of keys and values of all its pages, 64 tokens each, those of valid tokens."""
        keys, values = vectors
        if keys.shape[2] == self.tokens:
            return keys, values
        offsets = torch.arange(PAGE_TOKENS, device=self.lengths.device)
        valid = (offsets < self.lengths[:, None]).flatten().nonzero().flatten()
        return keys[:, :, valid], values[:, :, valid]

    def pages(self, first: int) -> Pages:
        """What kernels take, the first page's first token having position `first`."""
        starts, lengths = self.starts[None], self.lengths[None]
        return Pages(self.slab.pool, self.lease.slots, starts, lengths, first)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled with pages of its own: another process sees no later claim of ours."""
        own = _gathered(self, None)
        return _copied, (own.slab.pool, own.slots, own.lengths)

    def rows(self, slots: Int64[Tensor, "batch pages"]) -> "Run":
        """The same pages for other sequences."""
        return Run(self.slab, self.slab.slots.hold(slots), self.lengths, self.tokens, self.starts)

    def extend(self, run: "Run") -> "Run":
        """Both runs' pages as one run."""
        slots = torch.cat([self.slots, run.slots], 1)
        return Run.of(self.slab, slots, torch.cat([self.lengths, run.lengths]))

    def keep_first(self, tokens: int) -> "Run":
        """The run's first `tokens` tokens; its last page may become partly valid."""
        ends = self.lengths.cumsum(0)
        pages = int((ends < tokens).sum()) + 1
        lengths = self.lengths[:pages].clone()
        lengths[-1] -= int(ends[pages - 1]) - tokens
        return Run.of(self.slab, self.slots[:, :pages].contiguous(), lengths)

    def drop_first(self, tokens: int) -> "Run":
        """The run without the whole pages among its first `tokens` tokens."""
        pages = int((self.lengths.cumsum(0) <= tokens).sum())
        return Run.of(self.slab, self.slots[:, pages:].contiguous(), self.lengths[pages:])


class PagedHistory:
    """The compressed tokens of one layer: runs of pages, oldest first.

    Appending writes new pages only; forks, beams and repeated sequences share pages through their
    tables, and a slot nobody refers to any more is used again.

    Attributes:
        tokens: Compressed tokens a sequence.
        parts: The runs as kernels take them.
    """

    def __init__(self, kv_heads: int, key_bytes: int, value_bytes: int) -> None:
        self.kv_heads = kv_heads
        self.key_bytes = key_bytes
        self.value_bytes = value_bytes
        self.runs = ()

    @property
    def runs(self) -> tuple[Run, ...]:
        """What there is, oldest first; never changed, only replaced."""
        return self._runs

    @runs.setter
    def runs(self, runs: Iterable[Run]) -> None:
        self._runs = tuple(runs)
        firsts = [0, *accumulate(run.tokens for run in self._runs)]
        # What every step asks for.
        self.tokens = firsts[-1]
        self.parts = tuple(run.pages(first) for run, first in zip(self._runs, firsts, strict=False))

    def __copy__(self) -> "PagedHistory":
        # On the same runs, whose parts need not be made again.
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        # Copies of runs have pages of their own, and parts name those.
        return {name: x for name, x in self.__dict__.items() if name not in ("parts", "tokens")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.runs = state["_runs"]

    def reserve(self, batch: int, pages: int, device: torch.device) -> list[Run]:
        """Room for `pages` full pages a sequence, not yet part of the history: write, then push.

        What is left of the last slab is used up before there is a new one.
        """
        found: list[Run] = []
        if self.runs:
            found += _claimed(self.runs[-1].slab, batch, pages, device)
        missing = pages - sum(run.slots.shape[1] for run in found)
        if missing:
            found += _claimed(
                self._new_slab(missing * batch, batch, device), batch, missing, device
            )
        return found

    def push(self, run: Run) -> None:
        """Append reserved pages that have been written."""
        if self.runs and self.runs[-1].slab is run.slab:
            self.runs = (*self.runs[:-1], self.runs[-1].extend(run))
        else:
            self.runs = (*self.runs, run)

    def _new_slab(self, count: int, batch: int, device: torch.device) -> Slab:
        held = sum(run.slots.numel() for run in self.runs)
        least = MIN_SLAB_PAGES * batch if self.runs else 0
        capacity = max(count, min(held // GROWTH, MAX_SLAB_PAGES), least)
        return Slab.allocate(capacity, self.kv_heads, self.key_bytes, self.value_bytes, device)

    def keep_first(self, tokens: int) -> None:
        """Forget everything after the first `tokens` tokens."""
        kept: list[Run] = []
        for run in self.runs:
            if tokens <= 0:
                break
            kept.append(run if run.tokens <= tokens else run.keep_first(tokens))
            tokens -= run.tokens
        self.runs = kept

    def drop_first(self, tokens: int) -> int:
        """Forget the whole pages among the first `tokens` tokens; returns the tokens forgotten."""
        before = self.tokens
        kept: list[Run] = []
        for run in self.runs:
            rest = run if tokens <= 0 else run.drop_first(tokens)
            if rest.tokens:
                kept.append(rest)
            tokens -= run.tokens
        self.runs = kept
        return before - self.tokens

    def select(self, rows: Int[Tensor, " batch"]) -> None:
        """Keep, repeat or reorder sequences: only tables change, no code is copied."""
        self.runs = [run.rows(run.slots[rows]) for run in self.runs]

    def compact(self) -> None:
        """Copy pages out of slabs that are mostly garbage: dropped sequences free memory."""
        self.runs = [_compacted(run) for run in self.runs]

    def fork(self) -> "PagedHistory":
        """An independent history on the same pages.

        Threads may use and grow different forks at the same time, also while this one is used. One
        history is for one thread at a time; forking it counts as a use.
        """
        twin = PagedHistory(self.kv_heads, self.key_bytes, self.value_bytes)
        twin.runs = [run.rows(run.slots) for run in self.runs]
        return twin

    def tensors(self) -> list[Tensor]:
        """Every tensor held, unused slots of slabs included."""
        tables = [x for run in self.runs for x in (run.slots, run.lengths, run.starts)]
        return tables + [x for run in self.runs for x in run.slab.pool]

    def to(self, device: torch.device) -> None:
        """Move every page that is referred to."""
        self.runs = [
            run if run.slots.device == device else _gathered(run, device) for run in self.runs
        ]


def _claimed(slab: Slab, batch: int, pages: int, device: torch.device) -> list[Run]:
    lease = slab.slots.claim(batch, pages, device)
    if lease is None:
        return []
    lengths = torch.full((lease.slots.shape[1],), PAGE_TOKENS, device=device)
    return [Run.leased(slab, lease, lengths)]


def _compacted(run: Run) -> Run:
    live = run.slots.unique().numel()
    if run.slab.slots.shared(run.lease) or 2 * live > run.slab.slots.capacity:
        return run
    return _gathered(run, None)


def _gathered(run: Run, device: torch.device | None) -> Run:
    used, slots = run.slots.unique(return_inverse=True)
    target = device or used.device
    slab = Slab.allocate(len(used), *run.slab.page_shape, target)
    for new, old in zip(slab.pool, run.slab.pool, strict=True):
        new.copy_(old[used])
    return Run.of(Slab.full(slab.pool), slots.to(target), run.lengths.to(target))


def _copied(
    tensors: Sequence[Tensor],
    slots: Int64[Tensor, "batch pages"],
    lengths: Int64[Tensor, " pages"],
) -> Run:
    return Run.of(Slab.full(tensors), slots, lengths)
