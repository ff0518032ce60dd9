"""The whole numbers that the search compares (README.md, rules 2 and 3)."""

from typing import NamedTuple

import torch
from jaxtyping import Float32, Int32
from torch import Tensor

from sixfold.kernels._wide import wide
from sixfold.packing import Bits

# Whole numbers a standard deviation where costs have 8 bits: a variance costs 16, 64 or 90. More
# are finer, and fewer leave room for vectors with several outliers in a row.
_UNITS: dict[Bits, int] = {1: 724, 2: 1448, 2.5: 1722}
# Bits of a squared difference below those of a cost.
_SHIFT = 15


class SearchGrid(NamedTuple):
    """Codewords as whole numbers, and the intervals whose middles coordinates are moved to."""

    words: Int32[Tensor, " states"]
    half: Int32[Tensor, ""]
    """Of the width of an interval."""
    rate: Float32[Tensor, ""]
    """Intervals a standard deviation."""
    intervals: int
    most: int
    """Costs and their sums stop there."""

    def places(self, u: Float32[Tensor, "*b dim"]) -> Int32[Tensor, "*b dim"]:
        """Coordinates at the middles of their intervals."""
        end = self.intervals // 2
        numbers = (u * self.rate - 0.5).round().clamp(-end, end - 1).int()
        return (2 * numbers + 1) * self.half

    def costs(
        self, place: Int32[Tensor, "*#n"], word: Int32[Tensor, "*#n"]
    ) -> Int32[Tensor, "*#n"]:
        """What a coordinate costs in a state: the squared difference, rounded."""
        squared = (place - word).clamp(-(1 << 15), (1 << 15) - 1).square()
        return ((squared + (1 << _SHIFT - 1)) >> _SHIFT).clamp(max=self.most)


class GridSizes(NamedTuple):
    """What of a grid depends on the bits alone."""

    unit: int
    """Whole numbers a standard deviation."""
    intervals: int
    most: int
    """See `SearchGrid`."""
    largest: int
    """Codewords and coordinates stop there."""


def grid_sizes(bits: Bits) -> GridSizes:
    """The sizes of the grid for a width.

    Below 3 bits sums have 8 bits, and a table of the costs of a state fits two registers. With
    more, the codewords that can follow a state are so near each other that a coordinate far from
    all of them would cost more than 8 bits hold.
    """
    if bits in _UNITS:
        # Sums of 8 bits are narrowed as if differences did not saturate.
        return GridSizes(_UNITS[bits], 128, 0xFF, (1 << 14) - 1)
    return GridSizes(1 << 13, 1024, 0xFFFF, (1 << 15) - 1)


def search_grid(codewords: Float32[Tensor, " states"], bits: Bits) -> SearchGrid:
    """The grid for a codebook, without waiting for its device."""
    unit, intervals, most, largest = grid_sizes(bits)
    # Exact enough in float32 as well, which a test finds for all codewords there are.
    words = (codewords.to(wide(codewords.device)) * unit).round().clamp(-largest, largest).int()
    # To a quarter of a deviation beyond the outermost codeword: further out all costs are large.
    half = (words.abs().amax() + unit // 4 + intervals - 1) // intervals
    half = half.clamp(max=largest // intervals)
    width = (2 * half).to(wide(half.device))
    return SearchGrid(words, half, (torch.full_like(width, unit) / width).float(), intervals, most)
