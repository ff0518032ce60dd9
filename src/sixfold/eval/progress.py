"""How long measurements report on themselves; what they do with it is the caller's business."""

from collections.abc import Callable
from typing import TypeAlias

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the steps done and the steps in all, after every step."""


def no_progress(done: int, total: int) -> None:
    """Report nothing."""
