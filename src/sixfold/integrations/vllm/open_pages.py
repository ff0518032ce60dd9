"""Whose open page is in which row: vLLM tells a backend blocks, not requests."""

from collections import OrderedDict
from collections.abc import Sequence

from sixfold.errors import SixfoldError
from sixfold.packing import PAGE_TOKENS


class OpenPages:
    """Rows for the open pages of running requests, found by the block that each page will fill.

    A block belongs to one request as long as its page is open: only whole blocks are shared. When a
    request ends, vLLM does not say so. Its entry is dropped when another request begins the block,
    or when rows run out: those that were not used for the longest time first.
    """

    def __init__(self, requests: int) -> None:
        """Rows for so many requests that run at once, and as many that were left behind."""
        self.rows = 2 * requests
        self._free = list(reversed(range(self.rows)))
        self._row_of: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._row_of)

    def step(
        self, context: Sequence[int], ends: Sequence[int], blocks: Sequence[Sequence[int]]
    ) -> list[int]:
        """The row of each request of a step.

        Args:
            context: Tokens of each before the step.
            ends: Tokens after it.
            blocks: The blocks of each, from the one that its first new token is in.

        Raises:
            SixfoldError: A request has an open page that nobody kept.
        """
        rows: list[int | None] = []
        for old, own in zip(context, blocks, strict=True):
            held = old % PAGE_TOKENS > 0
            rows.append(self._held(own[0], old) if held else None)
        for old, own in zip(context, blocks, strict=True):
            for block in own[old % PAGE_TOKENS > 0 :]:
                self._drop(block)
        taken = [self._take() if row is None else row for row in rows]
        # A page that is completed is still read from its row in this step.
        for row, end, own in zip(taken, ends, blocks, strict=True):
            if end % PAGE_TOKENS:
                self._row_of[own[-1]] = row
            else:
                self._free.append(row)
        return taken

    def _held(self, block: int, context: int) -> int:
        row = self._row_of.pop(block, None)
        if row is None:
            raise SixfoldError(
                f"a request with {context} tokens of context returned after its last "
                f"{context % PAGE_TOKENS} were dropped: {self.rows // 2} requests (--max-num-seqs) "
                "ran since it did. Serve with a larger --max-num-seqs."
            )
        return row

    def _drop(self, block: int) -> None:
        row = self._row_of.pop(block, None)
        if row is not None:
            self._free.append(row)

    def _take(self) -> int:
        if not self._free:
            self._free.append(self._row_of.popitem(last=False)[1])
        return self._free.pop()
