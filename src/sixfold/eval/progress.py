"""How long measurements report on themselves; what they do with it is the caller's business."""

from collections.abc import Callable
from typing import TypeAlias

Progress: TypeAlias = Callable[[int, int, str], None]
"""Called after every step: the steps done, the steps in all, and what the step measured."""


def no_progress(done: int, total: int, name: str) -> None:
    """Report nothing."""


class Steps:
    """Counts the steps of a measurement, and reports each."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def done(self, name: str, count: int = 1) -> None:
        """One step more, or several, the last of which measured `name`."""
        self._done += count
        self._progress(self._done, self._total, name)
