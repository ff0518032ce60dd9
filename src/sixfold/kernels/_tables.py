"""Tables that would lead outside of what they are tables of are refused before they are read."""

import os

import torch
from torch import Tensor

from sixfold.errors import ShapeError
from sixfold.kernels.types import Pages
from sixfold.packing import PAGE_TOKENS

DEBUG_VARIABLE = "SIXFOLD_DEBUG"


def check_table(name: str, slots: Tensor, count: int) -> None:
    """Refuse slots that are not 0 to `count` - 1.

    Tables on a GPU are looked at only under `SIXFOLD_DEBUG=1`: it means to wait for the device.

    Raises:
        ShapeError: There is one.
    """
    if _readable(slots):
        _refuse(
            (slots < 0) | (slots >= count),
            slots,
            f"{name}: expected slots 0 to {count - 1}",
            "pass the memory that the table was made for",
        )


def check_pages(pages: Pages) -> None:
    """`check_table` of the page table, and the same for lengths and positions of pages.

    Raises:
        ShapeError: One of them is out of range.
    """
    check_table("pages.slots", pages.slots, len(pages.pool.key_codes))
    starts, lengths = pages.starts, pages.lengths
    if _readable(lengths):
        wrong = (lengths < 0) | (lengths > PAGE_TOKENS)
        _refuse(wrong, lengths, f"pages.lengths: expected 0 to {PAGE_TOKENS} tokens a page")
    if _readable(starts):
        _refuse(starts < -pages.first, starts, "pages.starts: expected positions from 0")


def _readable(x: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu" or os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0")


def _refuse(wrong: Tensor, x: Tensor, expected: str, advice: str = "count tokens anew") -> None:
    if wrong.any():
        where = wrong.nonzero()[0].tolist()
        raise ShapeError(f"{expected}, got {int(x[tuple(where)])} at {where}; {advice}")
