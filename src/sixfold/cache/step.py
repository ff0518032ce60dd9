"""What a serving engine does in one step, as kernels take it."""

import dataclasses
from collections.abc import Sequence
from functools import cached_property, partial
from itertools import accumulate, pairwise

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from sixfold.arguments import dense, sequence, settle, whole
from sixfold.cache.fill import Fill
from sixfold.cache.transfer import numbers_to_device
from sixfold.errors import ShapeError, SixfoldError
from sixfold.kernels._tables import check_table, readable
from sixfold.kernels.types import Pages, Pool, Tokens
from sixfold.packing import PAGE_TOKENS

WHOLE = (torch.int64, torch.int32, torch.int16, torch.uint8)
# Positions of all of them must be numbers that fit in memory.
MOST_TOKENS = 2**40


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of an engine: new tokens of some sequences, one sequence after the other.

    Made once a step, for all layers. Raw copies are kept where `rows` and `sinks` say: of the page
    that is open, which has no codes yet, and of others for accuracy, which have both.

    Attributes:
        new: New tokens of each sequence, at least one.
        context: Tokens of each sequence before them.
        slots: The page table: the block of every page of 64 tokens, up to the one that the last new
            token is in. Beyond, entries need only exist.
        rows: In which row the raw copy of each page is, on the CPU; -1 where there is none. Pages
            that are open before or after the step have one. Read are those of the page that is
            open, and of the one before it.
        sinks: In which row the raw copy of each sequence's first tokens is, on the CPU; -1 where
            there is none. None: no sequence has one.
        sink_tokens: How many these are.
    """

    new: Sequence[int]
    context: Sequence[int]
    slots: Int64[Tensor, "batch pages"]
    rows: Int64[Tensor, "batch pages"]
    sinks: Int64[Tensor, " batch"] | None = None
    sink_tokens: int = 0

    def __post_init__(self) -> None:
        settle(
            self,
            new=[whole("new", n, 1, MOST_TOKENS) for n in sequence("new", self.new)],
            context=[
                whole("context", n, 0, MOST_TOKENS) for n in sequence("context", self.context)
            ],
            sink_tokens=whole("sink_tokens", self.sink_tokens, 0, PAGE_TOKENS),
        )
        _check_tables(slots=self.slots, rows=self.rows, sinks=self._all_sinks)
        batch = len(self.new)
        table = (batch, self.slots.shape[1] if self.slots.ndim == 2 else 0)
        sinks = self._all_sinks.shape
        if (self.slots.shape, self.rows.shape, sinks, len(self.context)) != (
            table,
            table,
            (batch,),
            batch,
        ):
            raise ShapeError(
                f"expected the context of {batch} sequences, slots and rows [{batch}, pages] and "
                f"sinks [{batch}], got {len(self.context)}, {list(self.slots.shape)}, "
                f"{list(self.rows.shape)} and {list(sinks)}."
            )
        pages = max((-(-end // PAGE_TOKENS) for end in self.ends), default=0)
        if pages > table[1]:
            raise ShapeError(
                f"slots: expected {pages} pages for {max(self.ends)} tokens, got {table[1]}."
            )

    def check(self, blocks: int, rows: int, sinks: int) -> None:
        """Refuse tables that lead outside of so many blocks and rows, or to the same place twice.

        A table of blocks on a GPU is looked at under `SIXFOLD_DEBUG=1` alone.

        Raises:
            ShapeError: They do.
        """
        if (blocks, rows, sinks) in self._checked:
            return
        check_table("slots", self.slots, blocks)
        check_table("rows", self.rows + 1, rows + 1)
        if self.sinks is not None:
            check_table("sinks", self.sinks + 1, sinks + 1)
        self._check_open()
        for name, x, what in (
            ("rows", self.fill.rows_of_pages, "each page that is written to"),
            ("slots", self.fill.slots, "each page that is filled"),
            ("sinks", self.fill.sinks_of_sequences, "each sequence that begins"),
        ):
            if readable(x) and x.unique().numel() < len(x):
                raise ShapeError(f"{name}: expected one of its own for {what}, got {x.tolist()}.")
        self._check_copies()
        self._checked.add((blocks, rows, sinks))

    def _check_open(self) -> None:
        for b, (old, end) in enumerate(zip(self.context, self.ends, strict=True)):
            for tokens in (old, end):
                if tokens % PAGE_TOKENS and self.row_table[b, tokens // PAGE_TOKENS] < 0:
                    raise ShapeError(
                        f"rows: expected a row for page {tokens // PAGE_TOKENS} of sequence {b}, "
                        f"which is open at {tokens} tokens, got -1."
                    )

    def _check_copies(self) -> None:
        """Refuse a row that is read as the copy of one page and written as that of another."""
        if not readable(self.slots):
            return
        slots = self.slots.cpu().numpy()
        written: dict[int, int] = {}
        for own, rows, old, end in zip(slots, self.row_table, self.context, self.ends, strict=True):
            new = slice(old // PAGE_TOKENS, -(-end // PAGE_TOKENS))
            written.update(zip(rows[new].tolist(), own[new].tolist(), strict=True))
        for b, old in enumerate(self.context):
            row, slot = self.previous(b), int(slots[b, old // PAGE_TOKENS - 1])
            if row >= 0 and written.get(row, slot) != slot:
                raise ShapeError(
                    f"rows: row {row} is read as the copy of block {slot} and written as that of "
                    f"block {written[row]}."
                )

    @cached_property
    def _checked(self) -> set[tuple[int, int, int]]:
        return set()

    @cached_property
    def _all_sinks(self) -> Tensor:
        none = torch.full((len(self.new),), -1, dtype=torch.int64, device="cpu")
        return none if self.sinks is None else self.sinks

    @cached_property
    def row_table(self) -> np.ndarray:
        """`rows` for the host."""
        return self.rows.numpy().astype(np.int64)

    @cached_property
    def sink_rows(self) -> np.ndarray:
        """`sinks` for the host."""
        return self._all_sinks.numpy().astype(np.int64)

    @property
    def ends(self) -> list[int]:
        """Tokens of each sequence after the step."""
        return [old + new for old, new in zip(self.context, self.new, strict=True)]

    def previous(self, b: int) -> int:
        """The row that the page before the open one is read from; -1: its codes are."""
        page = self.context[b] // PAGE_TOKENS - 1
        return int(self.row_table[b, page]) if page >= 0 else -1

    def coded(self, b: int) -> int:
        """How many of a sequence's first pages are read as codes."""
        return self.context[b] // PAGE_TOKENS - (self.previous(b) >= 0)

    @cached_property
    def spans(self) -> list[slice]:
        """Where among all new tokens those of each sequence are."""
        return [slice(*pair) for pair in pairwise(accumulate(self.new, initial=0))]

    @cached_property
    def chunked(self) -> list[int]:
        """The sequences with several new tokens."""
        return [b for b, new in enumerate(self.new) if new > 1]

    @cached_property
    def fill(self) -> Fill:
        """Where the new tokens are kept."""
        return Fill.of(
            np.asarray(self.new, dtype=np.int64),
            np.asarray(self.context, dtype=np.int64),
            self.slots,
            self.row_table,
            self.sink_rows,
            self.sink_tokens,
        )

    @cached_property
    def single(self) -> "Part":
        """The sequences with one new token, together."""
        return Part.of(self, [b for b, new in enumerate(self.new) if new == 1])

    @cached_property
    def several(self) -> list["Part"]:
        """The others, each of its own."""
        return [Part.of(self, [b]) for b in self.chunked]


def _check_tables(**tables: Tensor) -> None:
    for name, x in tables.items():
        dense(name, x)
        if x.dtype not in WHOLE:
            raise SixfoldError(f"{name}: expected whole numbers, got {x.dtype}.")
        if name != "slots" and x.device.type != "cpu":
            raise SixfoldError(f"{name}: expected a tensor on the CPU, got one on {x.device}.")


@dataclasses.dataclass(frozen=True)
class Part:
    """Sequences of a step with equally many new tokens, as kernels take them.

    Attributes:
        tokens: Where their new tokens are among all; None where these are all, in order.
        slots: Their page table.
        starts: First token of each page.
        lengths: Coded tokens of each page.
        first: First token of the open page.
        position: First new token.
        start: First token that is read as codes.
        rows: Row of the open page; any where it has no token yet.
        previous: Row of the page before, and how many of its tokens are read from there; None where
            none are.
        sinks: Row of the first tokens; None where none are read from there.
        context: Tokens before the new ones.
        new: New tokens of each.
    """

    tokens: Int64[Tensor, " all_new"] | None
    slots: Int64[Tensor, "some pages"]
    starts: Int64[Tensor, "1 pages"]
    lengths: Int64[Tensor, "some pages"]
    first: Int64[Tensor, " some"]
    position: Int64[Tensor, " some"]
    start: Int64[Tensor, " some"]
    rows: Int64[Tensor, " some"]
    previous: tuple[Int64[Tensor, " some"], Int64[Tensor, " some"]] | None
    sinks: Int64[Tensor, " some"] | None
    context: list[int]
    new: int

    @classmethod
    def of(cls, step: Step, which: list[int]) -> "Part":
        """The part of a step that is about these sequences."""
        device = step.slots.device
        on = partial(numbers_to_device, device=device)
        context = [step.context[b] for b in which]
        position, coded = on(context), [step.coded(b) for b in which]
        starts = torch.arange(step.slots.shape[1], device=device)[None] * PAGE_TOKENS
        places = [place for b in which for place in range(step.spans[b].start, step.spans[b].stop)]
        previous = [step.previous(b) for b in which]
        sinks = [
            int(step.sink_rows[b]) if pages else -1 for b, pages in zip(which, coded, strict=True)
        ]
        return cls(
            None if len(which) == len(step.new) else on(places),
            step.slots[on(which)].long(),
            starts,
            (on(coded)[:, None] * PAGE_TOKENS - starts).clamp(0, PAGE_TOKENS),
            position // PAGE_TOKENS * PAGE_TOKENS,
            position,
            on([step.sink_tokens if row >= 0 else 0 for row in sinks]),
            on([max(0, int(step.row_table[b, step.context[b] // PAGE_TOKENS])) for b in which]),
            None
            if max(previous, default=-1) < 0
            else (
                on([max(0, row) for row in previous]),
                on([PAGE_TOKENS if row >= 0 else 0 for row in previous]),
            ),
            None if max(sinks, default=-1) < 0 else on([max(0, row) for row in sinks]),
            context,
            step.new[which[0]] if which else 0,
        )

    @property
    def batch(self) -> int:
        """How many sequences."""
        return len(self.context)

    def put(self, target: Tensor, x: Tensor) -> None:
        """Write theirs, packed, to where it belongs among all."""
        if self.tokens is None:
            target.copy_(x)
        else:
            target[self.tokens] = x.to(target.dtype)

    def take(self, x: Tensor) -> Tensor:
        """Theirs, [batch, heads, new, dim], of packed tokens [all, heads, dim]."""
        own: Tensor = x if self.tokens is None else x[self.tokens]
        return own.reshape(self.batch, -1, *own.shape[1:]).transpose(1, 2)

    def pages(self, pool: Pool) -> list[Pages]:
        """What of them is coded."""
        if max(self.context) < PAGE_TOKENS:
            return []
        return [Pages(pool, self.slots, self.starts, self.lengths, 0)]

    def raw(
        self, copies: tuple[Tensor, Tensor], sinks: tuple[Tensor, Tensor], more: int
    ) -> list[Tokens]:
        """What of them is read uncompressed, and `more` tokens that were just written there."""
        found = []
        if self.sinks is not None:
            zero = torch.zeros_like(self.position)
            found.append(Tokens(*sinks, zero, zero, self.start, self.sinks))
        if self.previous is not None:
            rows, tokens = self.previous
            first = (self.first - PAGE_TOKENS).clamp(min=0)
            found.append(Tokens(*copies, first, first, first + tokens, rows))
        return [*found, Tokens(*copies, self.first, self.first, self.position + more, self.rows)]
