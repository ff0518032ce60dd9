"""The same on other numbers of threads."""

from collections.abc import Callable
from typing import TypeVar

import torch

Made = TypeVar("Made")


def on_threads(make: Callable[[], Made], *counts: int) -> list[Made]:
    """What is made on each number of threads."""
    before, made = torch.get_num_threads(), []
    try:
        for count in counts:
            torch.set_num_threads(count)
            made.append(make())
    finally:
        torch.set_num_threads(before)
    return made
