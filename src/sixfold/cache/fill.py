"""Where the new tokens of an engine's step are kept, as codes and raw."""

import dataclasses
from collections.abc import Iterator
from functools import cached_property, partial
from typing import Self

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from sixfold.cache.transfer import to_device
from sixfold.packing import PAGE_TOKENS

# From so many pages of a sequence on they are encoded where their tokens lie, in a call of their
# own; fewer are gathered with those of other sequences.
RUN_PAGES = 4


@dataclasses.dataclass(frozen=True)
class Written:
    """New tokens and the places of their raw copies.

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
        raw: Raw copies to write. They change no token that was there.
        sinks: Raw copies of first tokens.
        full: Rows of pages that were open and are full then.
        pages: Tokens of pages that are new as a whole, a few of a sequence.
        runs: Tokens of such pages where a sequence has many.
        slots: The block of each page of `full`, `pages` and `runs`.
        beginning: Which of them are the first page of a sequence.
        rows_of_pages: Each row that is written to.
        sinks_of_sequences: Each row of `sinks` that is written to.
    """

    raw: Written
    sinks: Written
    full: Int64[Tensor, " full"]
    pages: Int64[Tensor, "whole page"]
    runs: list[slice]
    slots: Int64[Tensor, " filled"]
    beginning: Bool[Tensor, " filled"]
    rows_of_pages: Int64[Tensor, " written"]
    sinks_of_sequences: Int64[Tensor, " begun"]

    @classmethod
    def of(
        cls,
        new: np.ndarray,
        context: np.ndarray,
        slots: Int64[Tensor, "batch pages"],
        rows: np.ndarray,
        sinks: np.ndarray,
        sink_tokens: int,
    ) -> Self:
        """Where the tokens of a step go: arguments are those of `Step`, tables on the host."""
        end, opened, held = context + new, context // PAGE_TOKENS, context % PAGE_TOKENS > 0
        sequence, token = np.repeat(np.arange(len(new)), new), np.arange(new.sum())
        position = token + np.repeat(end - new.cumsum(), new)
        page = position // PAGE_TOKENS
        row, sink = rows[sequence, page], sinks[sequence]
        copied, sunk = row >= 0, (sink >= 0) & (position < sink_tokens)
        places = np.unique(np.stack([sequence, page])[:, copied], axis=1)

        filled = (held & ((opened + 1) * PAGE_TOKENS <= end)).nonzero()[0]
        # Pages that are new as a whole: from which one on, how many, and where their tokens begin.
        fresh = opened + held
        whole = np.maximum(end // PAGE_TOKENS - fresh, 0)
        start = new.cumsum() - new + fresh * PAGE_TOKENS - context
        few, many = whole * (whole < RUN_PAGES), whole * (whole >= RUN_PAGES)
        owner, place = _counted(np.concatenate([few, many]))
        owner %= len(new)
        owners = np.concatenate([filled, owner])
        pages = np.concatenate([opened[filled], fresh[owner] + place])
        first = (start[owner] + place * PAGE_TOKENS)[: few.sum()]

        on = partial(to_device, device=slots.device)
        offset = position % PAGE_TOKENS
        return cls(
            Written(*(on(x[copied]) for x in (token, row, offset))),
            Written(*(on(x[sunk]) for x in (token, sink, position))),
            on(rows[filled, opened[filled]]),
            on(first[:, None] + np.arange(PAGE_TOKENS)),
            [slice(start[b], start[b] + many[b] * PAGE_TOKENS) for b in many.nonzero()[0].tolist()],
            slots[on(owners), on(pages)].long(),
            on(pages == 0),
            torch.from_numpy(rows[places[0], places[1]]),
            torch.from_numpy(sinks[np.unique(sequence[sunk])]),
        )

    @cached_property
    def blocks(self) -> list[int]:
        """`slots` for the host, which waits for a GPU here."""
        found: list[int] = self.slots.tolist()
        return found

    def filled(self, copies: Tensor, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens of full pages, [batch, heads, tokens, dim], and their blocks, [batch, pages].

        Args:
            copies: Raw copies, [rows, heads, 64, dim].
            x: Packed new tokens, [all, heads, dim].
        """
        one = len(self.full), len(self.pages)
        full, pages, *runs = self.slots.split(
            [*one, *((run.stop - run.start) // PAGE_TOKENS for run in self.runs)]
        )
        if len(full):
            yield copies[self.full], full[:, None]
        if len(pages):
            yield x[self.pages].transpose(1, 2), pages[:, None]
        for run, slots in zip(self.runs, runs, strict=True):
            yield x[run].transpose(0, 1)[None], slots[None]


def _counted(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """0, 1, ... for each count, one after the other: of which count, and the number."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - np.repeat(counts.cumsum() - counts, counts)
