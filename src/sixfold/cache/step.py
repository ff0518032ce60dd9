"""What a serving engine does in one step, as kernels take it."""

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from sixfold.errors import ShapeError, SixfoldError
from sixfold.kernels._tables import check_table, readable
from sixfold.kernels.types import Pages, Pool, Tokens
from sixfold.packing import PAGE_TOKENS


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of an engine: new tokens of some sequences, one sequence after the other.

    Made once a step, for all layers.

    Attributes:
        new: New tokens of each sequence, at least one.
        context: Tokens of each sequence before them.
        slots: The page table: the block of every page of 64 tokens, up to the one that the last new
            token is in. Beyond, entries need only exist.
        rows: Which row its open page is in.
    """

    new: Sequence[int]
    context: Sequence[int]
    slots: Int64[Tensor, "batch pages"]
    rows: Int64[Tensor, " batch"]

    def __post_init__(self) -> None:
        batch = len(self.new)
        shapes = (batch, self.slots.shape[1] if self.slots.ndim == 2 else 0), (batch,)
        if len(self.context) != batch or (self.slots.shape, self.rows.shape) != shapes:
            raise ShapeError(
                f"expected the context of {batch} sequences, slots [{batch}, pages] and rows "
                f"[{batch}], got {len(self.context)}, {list(self.slots.shape)} and "
                f"{list(self.rows.shape)}."
            )
        for name, x in (("slots", self.slots), ("rows", self.rows)):
            if x.is_floating_point() or x.dtype is torch.bool:
                raise SixfoldError(f"{name}: expected whole numbers, got {x.dtype}.")
        if min(self.new, default=1) < 1 or min(self.context, default=0) < 0:
            raise SixfoldError(
                f"expected 1 or more new tokens after 0 or more, got {list(self.new)} new ones "
                f"after {list(self.context)}."
            )
        pages = max((-(-end // PAGE_TOKENS) for end in self.ends), default=0)
        if pages > shapes[0][1]:
            raise ShapeError(
                f"slots: expected {pages} pages for {max(self.ends)} tokens, got {shapes[0][1]}."
            )

    def check(self, blocks: int, rows: int) -> None:
        """Refuse tables that lead outside of so many blocks and rows, or two sequences in one row.

        Tables on a GPU are looked at under `SIXFOLD_DEBUG=1` alone.

        Raises:
            ShapeError: They do.
        """
        if (blocks, rows) in self._checked:
            return
        check_table("slots", self.slots, blocks)
        check_table("rows", self.rows, rows)
        written = torch.cat([self.fill.row_slots, self.fill.page_slots])
        for name, x, whose in (
            ("rows", self.rows, "for each sequence"),
            ("slots", written, "for each page that is filled"),
        ):
            if readable(x) and x.unique().numel() < len(x):
                raise ShapeError(f"{name}: expected one of its own {whose}, got {x.tolist()}.")
        self._checked.add((blocks, rows))

    @cached_property
    def _checked(self) -> set[tuple[int, int]]:
        return set()

    @property
    def ends(self) -> list[int]:
        """Tokens of each sequence after the step."""
        return [old + new for old, new in zip(self.context, self.new, strict=True)]

    @cached_property
    def spans(self) -> list[slice]:
        """Where among all new tokens those of each sequence are."""
        return [slice(*pair) for pair in pairwise(accumulate(self.new, initial=0))]

    @cached_property
    def chunked(self) -> list[int]:
        """The sequences with several new tokens."""
        return [b for b, new in enumerate(self.new) if new > 1]

    @cached_property
    def fill(self) -> "Fill":
        """Where the new tokens are kept."""
        return Fill.of(self)

    @cached_property
    def single(self) -> "Part":
        """The sequences with one new token, together."""
        return Part.of(self, [b for b, new in enumerate(self.new) if new == 1])

    @cached_property
    def several(self) -> list["Part"]:
        """The others, each of its own."""
        return [Part.of(self, [b]) for b in self.chunked]


@dataclasses.dataclass(frozen=True)
class Written:
    """New tokens and their places in open pages.

    Attributes:
        tokens: Which of all new tokens.
        rows: Row of each.
        offsets: Its place there.
    """

    tokens: Int64[Tensor, " some"]
    rows: Int64[Tensor, " some"]
    offsets: Int64[Tensor, " some"]

    def put(self, target: Tensor, x: Tensor) -> None:
        """Write them, of packed tokens [all, heads, dim]."""
        if len(self.tokens):
            target[self.rows, :, self.offsets] = x[self.tokens]


@dataclasses.dataclass(frozen=True)
class Fill:
    """Where the new tokens of a step are kept, those of all sequences at once.

    Attributes:
        first: Tokens to write to open pages before anything is encoded. They change no token that
            was there.
        full: Rows whose page is full then.
        row_slots: The block of each.
        pages: Tokens of the pages that are new as a whole.
        page_slots: The block of each.
        last: Tokens to write to open pages when all that is full is encoded.
    """

    first: Written
    full: Int64[Tensor, " full"]
    row_slots: Int64[Tensor, " full"]
    pages: Int64[Tensor, "whole page"]
    page_slots: Int64[Tensor, " whole"]
    last: Written

    @classmethod
    def of(cls, step: Step) -> "Fill":
        """Where the tokens of this step go."""
        device = step.slots.device
        new, context = (np.asarray(x, dtype=np.int64) for x in (step.new, step.context))
        end, opened = context + new, context // PAGE_TOKENS
        sequence = np.repeat(np.arange(len(new)), new)
        token = np.arange(len(sequence))
        position = token + np.repeat(context - (end - context).cumsum() + new, new)
        page = position // PAGE_TOKENS
        complete = (page + 1) * PAGE_TOKENS <= end[sequence]
        # Their page holds tokens already, or has come to hold them before another fills its row.
        begun = (page == opened[sequence]) & (context % PAGE_TOKENS > 0)[sequence]
        last = ~complete & ~begun & (context % PAGE_TOKENS > 0)[sequence]
        first, whole = begun | (~complete & ~last), complete & ~begun
        filled = (context % PAGE_TOKENS > 0) & ((opened + 1) * PAGE_TOKENS <= end)

        def on(x: np.ndarray) -> Tensor:
            return torch.from_numpy(x).to(device)

        def written(chosen: np.ndarray) -> Written:
            rows = step.rows[on(sequence[chosen])].long()
            return Written(on(token[chosen]), rows, on(position[chosen] % PAGE_TOKENS))

        def slots(sequences: np.ndarray, pages: np.ndarray) -> Tensor:
            return step.slots[on(sequences), on(pages)].long()

        starts = whole.nonzero()[0][::PAGE_TOKENS]
        return cls(
            written(first),
            step.rows[on(filled.nonzero()[0])].long(),
            slots(filled.nonzero()[0], opened[filled]),
            on(token[whole].reshape(-1, PAGE_TOKENS)),
            slots(sequence[starts], page[starts]),
            written(last),
        )


@dataclasses.dataclass(frozen=True)
class Part:
    """Sequences of a step with equally many new tokens, as kernels take them.

    Attributes:
        tokens: Where their new tokens are among all; None where these are all, in order.
        slots: Their page table.
        rows: Rows of their open pages.
        starts: First token of each page.
        lengths: Coded tokens of each page.
        first: First token of the open page.
        position: First new token.
        context: Tokens before the new ones.
        new: New tokens of each.
    """

    tokens: Int64[Tensor, " all_new"] | None
    slots: Int64[Tensor, "some pages"]
    rows: Int64[Tensor, " some"]
    starts: Int64[Tensor, "1 pages"]
    lengths: Int64[Tensor, "some pages"]
    first: Int64[Tensor, " some"]
    position: Int64[Tensor, " some"]
    context: list[int]
    new: int

    @classmethod
    def of(cls, step: Step, which: list[int]) -> "Part":
        """The part of a step that is about these sequences."""
        device = step.slots.device
        context = [step.context[b] for b in which]
        chosen = torch.tensor(which, dtype=torch.int64, device=device)
        position = torch.tensor(context, dtype=torch.int64, device=device)
        first = position // PAGE_TOKENS * PAGE_TOKENS
        starts = torch.arange(step.slots.shape[1], device=device)[None] * PAGE_TOKENS
        places = [place for b in which for place in range(step.spans[b].start, step.spans[b].stop)]
        everything = len(which) == len(step.new)
        return cls(
            None if everything else torch.tensor(places, dtype=torch.int64, device=device),
            step.slots[chosen].long(),
            step.rows[chosen].long(),
            starts,
            (first[:, None] - starts).clamp(0, PAGE_TOKENS),
            first,
            position,
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
        return [Pages(pool, self.slots, self.starts, self.lengths, 0, {})]

    def open_page(self, keys: Tensor, values: Tensor, more: int) -> Tokens:
        """Their open pages, and `more` tokens that were just written to them."""
        stop = self.position + more
        return Tokens(keys, values, self.first, self.first, stop, self.rows)
