"""Codebooks against published numbers, the theory's bounds, and integration by other means."""

import math

import numpy as np
import pytest
import torch

from sixfold.codebooks import centroids, expected_mse, lloyd_max, polar_angles
from sixfold.errors import SixfoldError
from sixfold.packing import BITS, Bits
from sixfold.pair_grids import PAIR_MIRRORS, pair_grid

# Large enough for the coordinate law to be normal to ten digits.
NORMAL = 10**9

# Positive halves for the normal law (paper.md §1 of the project; Max 1960 to 4 digits).
TABLE = {
    1: [0.797885],
    2: [0.452778, 1.510416],
    3: [0.245089, 0.755995, 1.343894, 2.151931],
    4: [0.128383, 0.388019, 0.656718, 0.942293, 1.256180, 1.617995, 2.068969, 2.732547],
}
NORMAL_MSE = {
    1: 0.363380,
    2: 0.117482,
    3: 0.034548,
    4: 0.009501,
    5: 0.002505,
    6: 0.000644,
    7: 0.000163,
    8: 0.000041,
}
MSE_128 = {2: 0.11600, 3: 0.03397, 4: 0.00932}


@pytest.mark.parametrize("bits", TABLE)
def test_normal_codebook_is_the_published_one(bits: int) -> None:
    # The table was iterated until its levels were within 2e-6 of the means of their cells, which
    # at 4 bits leaves them up to 5e-5 from the fixed point.
    levels = lloyd_max(NORMAL, bits)[2 ** (bits - 1) :]
    np.testing.assert_allclose(levels, TABLE[bits], atol=3e-6 if bits < 3 else 6e-5)


@pytest.mark.parametrize("bits", range(1, 9))
def test_normal_levels_are_the_means_of_their_cells_in_closed_form(bits: int) -> None:
    levels = lloyd_max(NORMAL, bits)[2 ** (bits - 1) :]
    edges = [0.0, *((levels[1:] + levels[:-1]) / 2), 40.0]
    density = np.array([math.exp(-edge * edge / 2) for edge in edges]) * math.sqrt(2 / math.pi)
    tail = np.array([math.erfc(edge / math.sqrt(2)) for edge in edges])
    np.testing.assert_allclose(levels, np.diff(density) / np.diff(tail), atol=1e-8)


@pytest.mark.parametrize("bits", NORMAL_MSE)
def test_distortion_is_the_published_one_and_below_the_bound(bits: int) -> None:
    assert expected_mse(NORMAL, bits) == pytest.approx(NORMAL_MSE[bits], abs=1e-6)
    # The bound of Theorem 1 (Panter-Dite) and the lower bound of Theorem 3.
    assert 4.0**-bits < expected_mse(NORMAL, bits) < math.sqrt(3) * math.pi / 2 * 4.0**-bits


@pytest.mark.parametrize("bits", MSE_128)
def test_sphere_codebook_gains_over_the_normal_one(bits: int) -> None:
    assert expected_mse(128, bits) == pytest.approx(MSE_128[bits], abs=6e-6)
    assert expected_mse(32, bits) < expected_mse(128, bits) < expected_mse(NORMAL, bits)


@pytest.mark.parametrize("dim", [2, 3, 4, 5, 17, 64, 128, 3072])
@pytest.mark.parametrize("bits", range(1, 9))
def test_levels_are_ascending_antisymmetric_and_the_means_of_their_cells(
    dim: int, bits: int
) -> None:
    levels = lloyd_max(dim, bits)
    assert levels.shape == (2**bits,)
    assert (np.diff(levels) > 0).all()
    assert np.array_equal(levels, -levels[::-1])
    assert np.abs(levels).max() < math.sqrt(dim)
    # u = sqrt(dim)·sin t has the density cos(t)^(dim-2) dt: a plain midpoint rule.
    width = min(math.pi / 2, 12 / math.sqrt(dim))
    t = ((np.arange(400_000) + 0.5) / 200_000 - 1) * width
    u, mass = math.sqrt(dim) * np.sin(t), np.cos(t) ** (dim - 2)
    cell = np.searchsorted((levels[1:] + levels[:-1]) / 2, u)
    means = np.bincount(cell, mass * u) / np.bincount(cell, mass)
    np.testing.assert_allclose(levels, means, atol=2e-4 * width * math.sqrt(dim))


@pytest.mark.parametrize("bits", BITS)
def test_tiny_dimensions_have_codebooks(bits: Bits) -> None:
    assert expected_mse(1, bits) == 0
    for dim in (1, 2, 3):
        assert centroids(dim, bits).isfinite().all()
        assert expected_mse(dim, bits) < 2.721 * 4.0**-bits


def test_uniform_law_has_uniform_levels() -> None:
    # Archimedes: a coordinate of the sphere in three dimensions is uniform.
    np.testing.assert_allclose(lloyd_max(3, 2), math.sqrt(3) * np.array([-0.75, -0.25, 0.25, 0.75]))


@pytest.mark.parametrize("dim", [0, -3])
def test_dimension_below_one_is_refused(dim: int) -> None:
    with pytest.raises(SixfoldError, match="dim must be at least 1"):
        centroids(dim, 4)


@pytest.mark.parametrize(("bits", "published"), [(2.5, 0.0576), (3.5, 0.0155)])
def test_pair_grids_reach_the_published_distortion(bits: float, published: float) -> None:
    assert expected_mse(NORMAL, bits) < 1.01 * published
    assert expected_mse(128, bits) < 1.01 * published


@pytest.mark.parametrize("symbol", PAIR_MIRRORS)
@pytest.mark.parametrize("dim", [2, 3, 4, 5, 64, 128])
def test_pair_grid_is_symmetric_and_its_index_starts_with_the_signs(dim: int, symbol: int) -> None:
    grid = pair_grid(dim, symbol)
    mirrors, half = PAIR_MIRRORS[symbol], 2 ** (symbol - 1)
    assert (grid[:half, 0] >= 0).all()
    np.testing.assert_array_equal(grid[half:], grid[:half] * [-1, 1])
    if mirrors == 2:
        quarter = half // 2
        assert (grid[:quarter, 1] >= 0).all()
        np.testing.assert_array_equal(grid[quarter:half], grid[:quarter] * [1, -1])


@pytest.mark.parametrize("bits", [1, 2, 2.5, 3, 3.5, 4])
@pytest.mark.parametrize("dim", [2, 3, 5, 31, 64])
def test_expected_mse_is_what_random_points_on_the_sphere_lose(dim: int, bits: Bits) -> None:
    x = torch.randn(300_000 // dim, dim, generator=torch.Generator().manual_seed(dim)).double()
    u = x / x.norm(dim=-1, keepdim=True) * math.sqrt(dim)
    book = centroids(dim, bits).double()
    if book.ndim == 1:
        error = (u[..., None] - book).square().amin(-1).mean()
    else:
        padded = torch.nn.functional.pad(u, (0, dim % 2))
        pairs = torch.stack(padded.chunk(2, dim=-1), dim=-1)
        nearest = book[torch.cdist(pairs.flatten(0, 1), book).argmin(-1)].view_as(pairs)
        error = (nearest.movedim(-1, -2).flatten(-2)[:, :dim] - u).square().mean()
    assert error.item() == pytest.approx(expected_mse(dim, bits), rel=0.025)


def test_polar_angles_are_the_published_ones() -> None:
    # PolarQuant's 2-bit levels (paper.md §5 of the project).
    published = {
        2: [0.30976, 0.63398, 0.93682, 1.26104],
        3: [0.42625, 0.67439, 0.89641, 1.14455],
        4: [0.52421, 0.70591, 0.86489, 1.04658],
    }
    for level, angles in published.items():
        np.testing.assert_allclose(polar_angles(level, 2), angles, atol=1e-5)
    np.testing.assert_allclose(polar_angles(1, 2), np.array([1, 3, 5, 7]) * math.pi / 4)


def test_codebooks_cannot_be_changed_by_accident() -> None:
    for book in (lloyd_max(64, 3), pair_grid(64, 5), polar_angles(2, 3)):
        with pytest.raises(ValueError, match="read-only"):
            book[0] = 0
