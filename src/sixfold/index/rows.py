"""Vectors as callers have them, read piece by piece as float32."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sixfold.arguments import dense, shown
from sixfold.errors import ShapeError, SixfoldError
from sixfold.index.ids import UNREADABLE, Ids
from sixfold.index.metric import Metric

# Vectors that are converted at a time.
BLOCK = 4096
# Of the coordinates of a vector that is not divided by its length.
MOST_SUM = 1e18


class Rows:
    """Vectors [n, dim], or one [dim]: an array, a tensor, or nested lists.

    Attributes:
        name: What messages call them.
        dim: Coordinates of a vector.
        single: Whether there was one, without an axis.
    """

    def __init__(self, name: str, given: Any, dim: int) -> None:
        """Refuse what holds no such vectors; numbers are looked at later.

        Raises:
            SixfoldError: It holds no real numbers, or hides some.
            ShapeError: They are not [n, dim].
        """
        self.name, self.dim = name, dim
        if isinstance(given, Tensor):
            dense(name, given)
            kind = (
                "c" if given.is_complex() else "?" if given.is_quantized or given.is_meta else "f"
            )
        else:
            given = _array(name, given)
            kind = given.dtype.kind
        if kind not in "fiub":
            raise SixfoldError(f"{name} must be real numbers in memory, got {shown(given.dtype)}")
        if given.ndim not in (1, 2) or given.shape[-1] != dim:
            raise ShapeError(f"{name}: expected [n, {dim}] or [{dim}], got {list(given.shape)}")
        self.single = given.ndim == 1
        self._given = given[None] if self.single else given

    def __len__(self) -> int:
        return len(self._given)

    def blocks(self, ids: Ids) -> Iterator[tuple[Tensor, Ids]]:
        """Pieces and their ids."""
        for start in range(0, len(self), BLOCK):
            part = slice(start, start + BLOCK)
            yield self._floats(self._given[part]), ids[part]

    def at(self, numbers: np.ndarray | slice) -> Tensor:
        """These vectors.

        Raises:
            SixfoldError: A number is not finite.
        """
        rows = self._floats(self._given[numbers])
        if not bool(rows.isfinite().all()):
            raise SixfoldError(f"{self.name} must be finite numbers, got others")
        return rows

    def sample(self, most: int) -> Tensor:
        """Some of the vectors, evenly spread."""
        return self._floats(self._given[:: max(1, -(-len(self) // most))])

    def everything(self, metric: Metric) -> Tensor:
        """All of them at once, checked as `check_finite` does."""
        rows = self._floats(self._given)
        self._check(rows, metric)
        return rows

    def check_finite(self, metric: Metric) -> None:
        """Refuse numbers that are not finite, or whose sums of squares are not.

        Raises:
            SixfoldError: There are such.
        """
        for start in range(0, len(self), BLOCK):
            self._check(self._floats(self._given[start : start + BLOCK]), metric)

    def _check(self, rows: Tensor, metric: Metric) -> None:
        if not rows.numel():
            return
        # Of NaN, NaN.
        most = max(map(abs, map(float, rows.aminmax())))
        bounded = most < (torch.inf if metric == "cosine" else MOST_SUM / self.dim)
        if not bounded:
            raise SixfoldError(
                f"{self.name} must be finite numbers (below 1e18/dim but for cosines), got "
                f"{'NaN' if most != most else most}"
            )

    def _floats(self, part: Any) -> Tensor:
        if isinstance(part, np.ndarray):
            # What is too large becomes infinite, and is refused.
            with np.errstate(over="ignore"):
                part = np.ascontiguousarray(part, dtype=np.float32)
            # PyTorch wants to be able to write to it.
            part = torch.from_numpy(part if part.flags.writeable else part.copy())
        plain: Tensor = part.detach().to("cpu", torch.float32).contiguous()
        return plain


def _array(name: str, given: Any) -> np.ndarray:
    if isinstance(given, np.ma.MaskedArray):
        raise SixfoldError(f"{name} must not be masked: pass x.filled(0), or the rows to keep")
    try:
        # No class of somebody else's, whose methods would run while the index changes.
        return np.asarray(given)
    except UNREADABLE as error:
        raise SixfoldError(
            f"{name} must be vectors of numbers, got {type(given).__name__}: {error}"
        ) from error
