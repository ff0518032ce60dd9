"""Pages of codes: storage that grows without moving, and tables that say whose page is where."""

import dataclasses
import weakref
from collections.abc import Sequence
from typing import Any, Self

import torch
from jaxtyping import Float16, Int, Int64, UInt8
from torch import Tensor

from sixfold.cache.memory import empty
from sixfold.packing import PAGE_TOKENS

MIN_SLAB_PAGES = 4
GROWTH = 16  # a new slab adds 1/16 of the history: at most 6 % of slack, few slabs
MAX_SLAB_PAGES = 128  # enough for its own cost not to show; below 1 % of a million tokens


@dataclasses.dataclass(eq=False)
class Slab:
    """A fixed piece of storage for pages of keys and values, shared by every cache that uses it.

    Attributes:
        key_codes: Key pages, one a slot (docs/format.md).
        key_scales: Their scales.
        value_codes: Value pages.
        value_scales: Their scales.
        used: Slots ever handed out; the rest has never been written.
        runs: Tables that refer to this slab, forks of the cache included.
    """

    key_codes: UInt8[Tensor, "slots kv_heads key_bytes"]
    key_scales: Float16[Tensor, "slots kv_heads page"]
    value_codes: UInt8[Tensor, "slots kv_heads value_bytes"]
    value_scales: Float16[Tensor, "slots kv_heads page"]
    used: int = 0
    runs: "weakref.WeakSet[Run]" = dataclasses.field(default_factory=weakref.WeakSet)

    @classmethod
    def allocate(
        cls, slots: int, kv_heads: int, key_bytes: int, value_bytes: int, device: torch.device
    ) -> Self:
        """Storage for `slots` pages."""

        def codes(page_bytes: int) -> Tensor:
            return empty(slots, kv_heads, page_bytes, dtype=torch.uint8, device=device)

        def scales() -> Tensor:
            return empty(slots, kv_heads, PAGE_TOKENS, dtype=torch.float16, device=device)

        # Memory from inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            return cls(codes(key_bytes), scales(), codes(value_bytes), scales())

    @classmethod
    def full(cls, tensors: Sequence[Tensor]) -> Self:
        """A slab with every slot in use, of tensors in the order of `tensors`."""
        key_codes, key_scales, value_codes, value_scales = tensors
        return cls(key_codes, key_scales, value_codes, value_scales, used=len(key_codes))

    @property
    def page_shape(self) -> tuple[int, int, int]:
        """KV heads, and bytes of one head's key codes and value codes of a page."""
        return self.key_codes.shape[1], self.key_codes.shape[2], self.value_codes.shape[2]

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Key codes, key scales, value codes, value scales."""
        return self.key_codes, self.key_scales, self.value_codes, self.value_scales

    def take(self, count: int, multiple: int) -> Int64[Tensor, " taken"]:
        """Slots nobody uses: `count` of them, or the most there are that `multiple` divides."""
        capacity = self.key_codes.shape[0]
        device = self.key_codes.device
        if capacity - self.used >= count:
            self.used += count
            return torch.arange(self.used - count, self.used, device=device)
        free = torch.ones(capacity, dtype=torch.bool, device=device)
        for run in self.runs:
            free[run.slots.flatten()] = False
        self.used = capacity
        idle = free.nonzero().flatten()[:count]
        return idle[: len(idle) // multiple * multiple]


@dataclasses.dataclass(eq=False)
class Run:
    """Consecutive pages of every sequence that lie in one slab. Never changed, only replaced.

    Attributes:
        slab: Where the pages are.
        slots: Which they are.
        lengths: Valid tokens of each page.
        tokens: Their sum.
        starts: Each page's first token, counted from the run's first.
        memo: See `sixfold.kernels.cached_attention.Pages`.
    """

    slab: Slab
    slots: Int64[Tensor, "batch pages"]
    lengths: Int64[Tensor, " pages"]
    tokens: int
    starts: Int64[Tensor, " pages"]
    memo: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.slab.runs.add(self)

    @classmethod
    def of(
        cls, slab: Slab, slots: Int64[Tensor, "batch pages"], lengths: Int64[Tensor, " pages"]
    ) -> Self:
        """A run of pages of these lengths."""
        ends = lengths.cumsum(0)
        return cls(slab, slots, lengths, int(ends[-1]) if len(ends) else 0, ends - lengths)

    def rows(self, slots: Int64[Tensor, "batch pages"]) -> "Run":
        """The same pages for other sequences."""
        return Run(self.slab, slots, self.lengths, self.tokens, self.starts)

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
    """

    def __init__(self, kv_heads: int, key_bytes: int, value_bytes: int) -> None:
        self.kv_heads = kv_heads
        self.key_bytes = key_bytes
        self.value_bytes = value_bytes
        self.runs: list[Run] = []

    @property
    def tokens(self) -> int:
        """Compressed tokens a sequence."""
        return sum(run.tokens for run in self.runs)

    def reserve(self, batch: int, pages: int, device: torch.device) -> list[Run]:
        """Room for `pages` full pages a sequence, not yet part of the history: write, then push.

        What is left of the last slab is used up before there is a new one.
        """
        slabs = [self.runs[-1].slab] if self.runs else []
        found = [(slab, slab.take(pages * batch, batch)) for slab in slabs]
        missing = pages * batch - sum(len(slots) for _, slots in found)
        if missing:
            slab = self._new_slab(missing, batch, device)
            found.append((slab, slab.take(missing, batch)))
        return [_full_pages(slab, slots, batch) for slab, slots in found if len(slots)]

    def push(self, run: Run) -> None:
        """Append reserved pages that have been written."""
        if self.runs and self.runs[-1].slab is run.slab:
            self.runs[-1] = self.runs[-1].extend(run)
        else:
            self.runs.append(run)

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
        """An independent history on the same pages."""
        twin = PagedHistory(self.kv_heads, self.key_bytes, self.value_bytes)
        twin.runs = [run.rows(run.slots) for run in self.runs]
        return twin

    def tensors(self) -> list[Tensor]:
        """Every tensor held, unused slots of slabs included."""
        tables = [x for run in self.runs for x in (run.slots, run.lengths, run.starts)]
        return tables + [x for run in self.runs for x in run.slab.tensors]

    def to(self, device: torch.device) -> None:
        """Move every page that is referred to."""
        self.runs = [
            run if run.slots.device == device else _gathered(run, device) for run in self.runs
        ]


def _full_pages(slab: Slab, slots: Int64[Tensor, " count"], batch: int) -> Run:
    table = slots.view(-1, batch).T.contiguous()
    return Run.of(slab, table, torch.full((table.shape[1],), PAGE_TOKENS, device=slots.device))


def _compacted(run: Run) -> Run:
    live = run.slots.unique().numel()
    shared = any(other is not run for other in run.slab.runs)
    return run if shared or 2 * live > run.slab.key_codes.shape[0] else _gathered(run, None)


def _gathered(run: Run, device: torch.device | None) -> Run:
    used, slots = run.slots.unique(return_inverse=True)
    target = device or used.device
    slab = Slab.allocate(len(used), *run.slab.page_shape, target)
    for new, old in zip(slab.tensors, run.slab.tensors, strict=True):
        new.copy_(old[used])
    slab.used = len(used)
    return Run.of(slab, slots.to(target), run.lengths.to(target))
