"""Two-dimensional codebooks: 32 or 128 points for a pair of coordinates (2.5 and 3.5 bits).

The pair's density is proportional to (1 - r²/dim)^((dim-4)/2) in the disc of radius sqrt(dim).
Grids are symmetric under sign flips of the first one or two coordinates, and the top bits of an
index are those signs, so a nearest-point search folds the pair and visits the unflipped points
alone. One flip for 32 points because a second would cost 2 % more distortion.
"""

import math
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from jaxtyping import Float64

_Array: TypeAlias = npt.NDArray[np.floating]

# Symbol bits -> mirrored coordinates.
PAIR_MIRRORS = {5: 1, 7: 2}
# Where the spiral starts, in turns: the best of 50 by the distortion Lloyd's iteration reaches.
_SPIRAL_PHASE = {5: 0.22, 7: 0.78}
# In standard deviations; the mass beyond is below 1e-9.
_REACH = 6.5
_RINGS, _FINE_RINGS = 128, 256
_MAX_STEPS = 500
# Lloyd's iteration on finitely many nodes ends at one of many neighbouring fixed points. Nodes
# coarser than the last bit of any libm make every machine take the same path to the same one.
_DIGITS = 10


def _midpoints(count: int) -> _Array:
    return (np.arange(count) + 0.5) / count


def _points(radius: _Array, turn: _Array, mirrors: int) -> _Array:
    """Points [n, 2] in the half-plane x > 0 or the first quadrant; `turn` in [0, 1] spans it."""
    angle = math.pi / mirrors * turn - (math.pi / 2 if mirrors == 1 else 0)
    points = np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=-1)
    return np.round(points, _DIGITS)


def _nodes(dim: int, mirrors: int, rings: int) -> tuple[_Array, _Array]:
    """Midpoint rule for the folded pair density: points [n, 2] and weights [n].

    The radius is sqrt(dim)·sin(tilt), which removes the pole of dim = 3. For dim = 2 the pair
    lies on a circle; for dim = 1 it is one coordinate of ±1 and the padding.
    """
    if dim == 1:
        return np.array([[1.0, 0.0]]), np.ones(1)
    tilt = _midpoints(rings) * math.asin(min(1.0, _REACH / math.sqrt(dim)))
    weights = np.sin(tilt) * np.cos(tilt) ** max(dim - 3, 0)
    if dim == 2:
        tilt, weights = np.array([math.pi / 2]), np.ones(1)
    turn = _midpoints(2 * rings // mirrors)
    radius = np.repeat(math.sqrt(dim) * np.sin(tilt), turn.size)
    mass = np.repeat(weights / weights.sum() / turn.size, turn.size)
    return _points(radius, np.tile(turn, tilt.size), mirrors), mass


def _spiral(dim: int, mirrors: int, count: int, phase: float) -> _Array:
    """Fibonacci spiral [count, 2] after density^(1/2), the optimal density of many points."""
    if dim <= 2:
        return _points(np.full(count, math.sqrt(dim)), _midpoints(count), mirrors)
    r = _midpoints(4_000) * min(math.sqrt(dim), _REACH)
    mass = np.cumsum(r * (1 - r * r / dim) ** ((dim - 4) / 4))
    radius = np.interp(_midpoints(count), mass / mass[-1], r)
    golden = (math.sqrt(5) - 1) / 2
    return _points(radius, ((np.arange(count) + 0.5) * golden + phase) % 1, mirrors)


def _nearest(nodes: _Array, points: _Array) -> tuple[npt.NDArray[np.intp], _Array]:
    """Index of the nearest point of every node, and its squared distance."""
    squares = (nodes[:, :1] - points[:, 0]) ** 2 + (nodes[:, 1:] - points[:, 1]) ** 2
    index = squares.argmin(-1)
    return index, squares[np.arange(index.size), index]


def _lloyd(nodes: _Array, mass: _Array, points: _Array) -> _Array:
    """Move every point to the mean of its cell until nothing moves; empty cells stay."""
    for _ in range(_MAX_STEPS):
        index, _ = _nearest(nodes, points)
        total = np.bincount(index, mass, len(points))
        sums = [np.bincount(index, mass * nodes[:, axis], len(points)) for axis in (0, 1)]
        filled = total[:, None] > 0
        moved = np.where(filled, np.stack(sums, -1) / np.where(filled, total[:, None], 1), points)
        if np.array_equal(moved, points):
            break
        points = moved
    return points


def _mirrored(points: _Array, mirrors: int) -> _Array:
    """All points, those with a negative second, then first, coordinate behind the others."""
    for axis in range(mirrors)[::-1]:
        sign = np.where(np.arange(2) == axis, -1.0, 1.0)
        points = np.concatenate((points, points * sign))
    return points


@lru_cache
def pair_grid(dim: int, symbol_bits: int) -> Float64[np.ndarray, "points 2"]:
    """Least-squares quantizer of a pair of coordinates of a random vector of norm sqrt(dim).

    Args:
        dim: Dimension of the vector that was rotated.
        symbol_bits: 5 or 7.

    Returns:
        float64[2**symbol_bits, 2] in units of one standard deviation. Index bits, highest first:
        the sign of the first coordinate, the sign of the second (7 bits only), and the index of
        the point in the half-plane x > 0 (5 bits) or the first quadrant (7 bits).
    """
    mirrors = PAIR_MIRRORS[symbol_bits]
    count = 2 ** (symbol_bits - mirrors)
    start = _spiral(dim, mirrors, count, _SPIRAL_PHASE[symbol_bits])
    folded = _lloyd(*_nodes(dim, mirrors, _RINGS), start)
    grid = _mirrored(np.round(folded, _DIGITS), mirrors)
    grid.setflags(write=False)
    return grid


@lru_cache
def pair_mse(dim: int, symbol_bits: int) -> float:
    """Mean squared error per coordinate of `pair_grid`, by integration over the disc.

    Of the last pair of an odd `dim` only the first coordinate counts; the other is padding.
    """
    mirrors = PAIR_MIRRORS[symbol_bits]
    points = pair_grid(dim, symbol_bits)[: 2 ** (symbol_bits - mirrors)]
    nodes, mass = _nodes(dim, mirrors, _FINE_RINGS)
    if dim == 1:
        index, _ = _nearest(nodes, points)
        return float((nodes[0, 0] - points[index[0], 0]) ** 2)
    pair = float(mass @ _nearest(nodes, points)[1])
    if dim % 2 == 0:
        return pair / 2
    # A coordinate of a pair has the coordinate law, so its nodes serve for the unpaired one.
    alone = np.stack((nodes[:, 0], np.zeros(len(nodes))), axis=-1)
    index, _ = _nearest(alone, points)
    unpaired = float(mass @ (nodes[:, 0] - points[index, 0]) ** 2)
    return (pair * (dim // 2) + unpaired) / dim
