"""Codebooks for the coordinates of a random unit vector, scaled to unit variance.

A rotated unit vector is uniform on the sphere S^(dim-1), so one coordinate u (times sqrt(dim))
has density proportional to (1 - u²/dim)^((dim-3)/2) and a pair has (1 - r²/dim)^((dim-4)/2)
(arXiv:2504.19874, Lemma 1). Their optimal quantizers depend on nothing but `dim` and the number
of levels, hence no training. Computed in float64 and cached by every argument.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float32, Float64
from torch import Tensor

from sixfold._surroundings import outside_inference_mode
from sixfold.arguments import whole
from sixfold.packing import Bits, check_bits, is_paired, symbol_bits
from sixfold.pair_grids import pair_grid, pair_mse

_Array: TypeAlias = npt.NDArray[np.floating]
_Density: TypeAlias = Callable[[_Array], _Array]

# In standard deviations; the mass beyond is below 1e-32.
_REACH = 12.0
_NEWTON_STEPS = 100
_CPU = torch.device("cpu")
# Coarser than the last bit of any libm, so that every machine gets the same codebooks.
_DIGITS = 10


def _quadrature(edges: _Array) -> tuple[_Array, _Array]:
    """Nodes and weights [cells, nodes] of Gauss-Legendre rules between consecutive edges.

    The nodes are clustered by sin² towards both ends: an inverse square root there (the density
    of dim = 2) is then integrated exactly too.
    """
    x, w = np.polynomial.legendre.leggauss(64)
    angle = math.pi / 4 * (x + 1)
    width = np.diff(edges)[:, None]
    nodes = edges[:-1, None] + width * np.sin(angle) ** 2
    return nodes, width * w * (math.pi / 4) * np.sin(2 * angle)


def _point_law(density: _Density, reach: float, count: int) -> _Array:
    """Quantiles of density^(1/3), the asymptotically optimal density of levels (Panter-Dite)."""
    x = (np.arange(20_000) + 0.5) * (reach / 20_000)
    mass = np.cumsum(np.cbrt(density(x)))
    quantiles: _Array = np.interp((np.arange(count) + 0.5) / count, mass / mass[-1], x)
    return quantiles


def _edges(levels: _Array, reach: float) -> _Array:
    return np.concatenate(([0.0], (levels[1:] + levels[:-1]) / 2, [reach]))


def _symmetric_levels(density: _Density, reach: float, count: int) -> _Array:
    """Positive half of the Lloyd-Max levels of an even density on [-reach, reach].

    Solves "each level is the mean of its cell" by Newton's method: a cell sees only its two
    neighbours, so the Jacobian is tridiagonal, and some ten steps do what takes Lloyd's
    alternation many thousand at 8 bits.
    """
    levels = _point_law(density, reach, count)
    for _ in range(_NEWTON_STEPS):
        edges = _edges(levels, reach)
        nodes, weights = _quadrature(edges)
        weights = weights * density(nodes)
        mass = weights.sum(-1)
        mean = (weights * nodes).sum(-1) / mass
        inner = edges[1:-1]
        pull = density(inner) / 2
        above = pull * (inner - mean[:-1]) / mass[:-1]
        below = pull * (mean[1:] - inner) / mass[1:]
        diagonal = 1 - np.append(above, 0) - np.insert(below, 0, 0)
        jacobian = np.diag(diagonal) - np.diag(above, 1) - np.diag(below, -1)
        step = np.linalg.solve(jacobian, levels - mean)
        levels = levels - step
        if np.abs(step).max() < 1e-13:
            break
    return levels


def _coordinate_density(dim: int) -> _Density:
    return lambda u: (1 - u * u / dim) ** ((dim - 3) / 2)


def _frozen(array: _Array) -> _Array:
    array.setflags(write=False)
    return array


def lloyd_max(dim: int, bits: int) -> Float64[np.ndarray, " levels"]:
    """Least-squares quantizer of one coordinate of a random vector of norm sqrt(dim).

    Args:
        dim: Dimension of the vector that was rotated.
        bits: 1 to 8.

    Returns:
        float64[2**bits], ascending and exactly antisymmetric, in units of one standard deviation
        of the coordinate.

    Raises:
        SixfoldError: `dim` is below 1, or `bits` is none of those.

    Source: arXiv:2504.19874, Eq. 4.
    """
    return _lloyd_max(whole("dim", dim, 1), whole("bits", bits, 1, 8))


@lru_cache
def _lloyd_max(dim: int, bits: int) -> Float64[np.ndarray, " levels"]:
    if dim == 1:
        # The coordinate is exactly ±1: any levels that include those two are perfect.
        return _frozen(np.linspace(-1, 1, 2**bits))
    reach = min(math.sqrt(dim), _REACH)
    half = np.round(_symmetric_levels(_coordinate_density(dim), reach, 2 ** (bits - 1)), _DIGITS)
    return _frozen(np.concatenate((-half[::-1], half)))


def polar_angles(level: int, bits: int) -> Float64[np.ndarray, " levels"]:
    """Least-squares quantizer of an angle of PolarQuant's `level`, in radians.

    Level 1 is uniform on [0, 2π); level l > 1 lies in [0, π/2] with density proportional to
    sin(2ψ)^(2^(l-1) - 1), exact for rotated vectors of any dimension.

    Raises:
        SixfoldError: `level` is not 1 to 20, or `bits` not 1 to 8.

    Source: arXiv:2502.02617, Lemma 2.
    """
    return _polar_angles(whole("level", level, 1, 20), whole("bits", bits, 1, 8))


@lru_cache
def _polar_angles(level: int, bits: int) -> Float64[np.ndarray, " levels"]:
    count = 2**bits
    if level == 1:
        return _frozen((np.arange(count) + 0.5) * (2 * math.pi / count))
    power = 2 ** (level - 1) - 1
    half = _symmetric_levels(lambda v: np.cos(2 * v) ** power, math.pi / 4, count // 2)
    return _frozen(math.pi / 4 + np.round(np.concatenate((-half[::-1], half)), _DIGITS))


def centroids(
    dim: int, bits: Bits, device: torch.device = _CPU
) -> Float32[Tensor, " levels *pair"]:
    """The codebook of `bits` as kernels take it: indexed by symbol.

    Returns:
        float32[2**symbol_bits], or [2**symbol_bits, 2] where symbols stand for pairs, in units
        of one standard deviation of a coordinate. Cached: do not modify.

    Raises:
        SixfoldError: `bits` is not a supported width or `dim` is below 1.
    """
    return _tensor(whole("dim", dim, 1), check_bits(bits), device)


# What `torch.compiler.assume_constant_result` does, without half of torch to import.
centroids._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache
@outside_inference_mode
def _tensor(dim: int, bits: Bits, device: torch.device) -> Float32[Tensor, " levels *pair"]:
    book = (pair_grid if is_paired(bits) else lloyd_max)(dim, symbol_bits(bits))
    return torch.tensor(book, dtype=torch.float32, device=device)


def expected_mse(dim: int, bits: Bits) -> float:
    """Mean squared error per coordinate of the codebook, for coordinates of unit variance.

    This is E‖x - x̂‖² / ‖x‖² of a vector that is rotated at random and keeps its exact norm
    (paper: d·C(f, b)), by exact integration.

    Raises:
        SixfoldError: `bits` is not a supported width or `dim` is below 1.
    """
    return _expected_mse(whole("dim", dim, 1), check_bits(bits))


@lru_cache
def _expected_mse(dim: int, bits: Bits) -> float:
    if is_paired(bits):
        return pair_mse(dim, symbol_bits(bits))
    if dim == 1:
        return 0.0
    levels = lloyd_max(dim, int(bits))[2 ** (int(bits) - 1) :]
    nodes, weights = _quadrature(_edges(levels, min(math.sqrt(dim), _REACH)))
    weights = weights * _coordinate_density(dim)(nodes)
    return float((weights * (nodes - levels[:, None]) ** 2).sum() / weights.sum())
