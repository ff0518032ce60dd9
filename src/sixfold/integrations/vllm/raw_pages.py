"""Which tokens are kept raw, and in which row: vLLM tells a backend blocks, not requests.

When a request ends vLLM does not say so, and its entries stay. They are dropped when another
request begins their block, or when rows run out.
"""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from sixfold.errors import SixfoldError
from sixfold.packing import PAGE_TOKENS

# Steps that no running request is left out of in a row.
LONG_AGO = 64


def page_rows(requests: int, *, recent: bool) -> int:
    """Rows of `RawPages` for so many requests that run at once, and as many that were left behind.

    In one step a request may read two and write two.
    """
    return (4 if recent else 2) * requests


def sink_rows(requests: int) -> int:
    """Rows of `SinkRows` for so many requests that run at once, and as many cached prefixes."""
    return 2 * requests


class RawPages:
    """Rows for the open pages of running requests and the page before each, found by their blocks.

    The block of an open page belongs to one request: only whole blocks are shared. A page that is
    full has codes as well, so that losing its row costs accuracy only.
    """

    def __init__(
        self, requests: int, *, recent: bool, rows: int | None = None, full: int | None = None
    ) -> None:
        """Rows for so many requests that run at once, and for as many that were left behind.

        Args:
            requests: That run at once.
            recent: Whether the last full page is kept raw, too.
            rows: Fewer rows than that, where their memory is scarce (`Beside`).
            full: Of these, most that full pages have.
        """
        self.recent = recent
        self.rows = page_rows(requests, recent=recent) if rows is None else rows
        self.most_full = self.rows if full is None else full
        # Rows from here on were never used, and have no memory yet.
        self.used = 0
        self._free: list[int] = []
        self._open: OrderedDict[int, int] = OrderedDict()
        self._full: OrderedDict[int, int] = OrderedDict()
        self._busy: set[int] = set()
        self._leaving = 0
        self._now = 0
        self._seen: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._open) + len(self._full)

    def step(
        self, context: Sequence[int], ends: Sequence[int], blocks: Sequence[Sequence[int]]
    ) -> np.ndarray:
        """The row of each page of each request of a step, -1 for none: int64 [requests, pages].

        Args:
            context: Tokens of each before the step.
            ends: Tokens after it.
            blocks: The block of each of its pages. One that a request fills in this step may be
                in the context of another.

        Raises:
            SixfoldError: A request has an open page that nobody kept.
        """
        table = np.full((len(blocks), max(map(len, blocks), default=0)), -1, dtype=np.int64)
        for old, own in zip(context, blocks, strict=True):
            for block in own[-(-old // PAGE_TOKENS) :]:
                self._drop(block)
        for rows, old, own in zip(table, context, blocks, strict=True):
            self._read(rows, old, own)
        # Rows of this step are nobody else's before the next.
        self._busy = set(table[table >= 0].tolist())
        self._now += 1
        self._seen.update(dict.fromkeys(self._busy, self._now))
        later: list[int] = []
        self._leaving = 0
        for rows, old, end, own in zip(table, context, ends, blocks, strict=True):
            self._write(rows, old, end, own, later)
        self._free += later
        return table

    def _read(self, rows: np.ndarray, context: int, blocks: Sequence[int]) -> None:
        page, held = divmod(context, PAGE_TOKENS)
        if page and blocks[page - 1] in self._full:
            self._full.move_to_end(blocks[page - 1])
            rows[page - 1] = self._full[blocks[page - 1]]
        if held:
            row = self._open.pop(blocks[page], None)
            if row is None:
                raise SixfoldError(
                    f"a request with {context} tokens of context returned after its last {held} "
                    "were dropped, as too many others ran since it did. Serve with a larger "
                    "--max-num-seqs."
                )
            rows[page] = row

    def _write(
        self, rows: np.ndarray, context: int, end: int, blocks: Sequence[int], later: list[int]
    ) -> None:
        page, held = divmod(context, PAGE_TOKENS)
        last, rest = divmod(end, PAGE_TOKENS)
        fresh = page + (held > 0)
        if last > page:
            # What was read as the page before the open one is no longer.
            if page and blocks[page - 1] in self._full:
                later.append(self._full.pop(blocks[page - 1]))
                self._leaving += 1
            # Where the open page is the full one then, its row is.
            leaving = 0 if last == fresh and held else self._leaving
            kept = self.recent and self._room_for_full(leaving)
            if kept and last > fresh:
                rows[last - 1] = self._take()
            if kept:
                self._full[blocks[last - 1]] = int(rows[last - 1])
            if held and not (kept and last == fresh):
                later.append(int(rows[page]))
        if rest:
            if rows[last] < 0:
                rows[last] = self._take()
            self._open[blocks[last]] = int(rows[last])

    def _room_for_full(self, leaving: int) -> bool:
        """Whether another full page may have a row: the oldest that is not read gives up its.

        Args:
            leaving: Rows of full pages that are free after the step only.
        """
        if len(self._full) + leaving < self.most_full:
            return True
        for block, row in self._full.items():
            if row not in self._busy:
                self._free.append(self._full.pop(block))
                return len(self._full) + leaving < self.most_full
        return False

    def _drop(self, block: int) -> None:
        for entries in (self._open, self._full):
            if block in entries:
                self._free.append(entries.pop(block))

    def _take(self) -> int:
        row = self._free.pop() if self._free else self._another()
        self._busy.add(row)
        self._seen[row] = self._now
        return row

    def _another(self) -> int:
        oldest = next(iter(self._full.items()), None)
        # Whoever runs was in some step not long ago: this page's request has ended.
        if oldest is not None and self._now - self._seen[oldest[1]] > LONG_AGO:
            return self._full.pop(oldest[0])
        if self.used < self.rows:
            self.used += 1
            return self.used - 1
        return self._evicted()

    def _evicted(self) -> int:
        """The row that was not used for the longest time, of full pages if there are any."""
        for entries in (self._full, self._open):
            for block, row in entries.items():
                if row not in self._busy:
                    del entries[block]
                    return row
        raise SixfoldError(
            f"more requests run at once than the {self.rows} rows of raw pages are for"
        )


class SinkRows:
    """Rows for the first tokens of sequences, found by the block that they are in.

    They stay as long as the block is cached, if there is room: a request that shares the prefix
    finds them. Without, they are read as codes.
    """

    def __init__(self, requests: int, rows: int | None = None) -> None:
        """See `sink_rows`; or so many rows."""
        self.rows = sink_rows(requests) if rows is None else rows
        self._free = list(reversed(range(self.rows)))
        self._row_of: OrderedDict[int, int] = OrderedDict()

    def step(self, context: Sequence[int], first: Sequence[int]) -> np.ndarray:
        """The row of each request of a step, -1 for none: int64 [requests].

        Args:
            context: Tokens of each before the step.
            first: The block of each one's first page.
        """
        for old, block in zip(context, first, strict=True):
            if old and block in self._row_of:
                self._row_of.move_to_end(block)
        for old, block in zip(context, first, strict=True):
            if not old:
                self._begin(block)
        return np.array([self._row_of.get(block, -1) for block in first], dtype=np.int64)

    def _begin(self, block: int) -> None:
        row = self._row_of.pop(block, None)
        if row is None:
            row = self._free.pop() if self._free else self._row_of.popitem(last=False)[1]
        self._row_of[block] = row
