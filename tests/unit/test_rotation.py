"""Rotations are orthogonal, uniform enough, and the same everywhere."""

import numpy as np
import pytest
import torch

from sixfold.errors import SixfoldError
from sixfold.hadamard import hadamard_factor
from sixfold.rotation import Rotation, RotationKind, gaussian, haar, random_bits
from tests.vectors import gaussian as gaussian_vectors

CPU = torch.device("cpu")
KINDS: list[RotationKind] = ["hadamard", "orthogonal"]

# Factor orders: 1 for powers of two, Paley I (12, 20, 44), Paley II over a prime (28 by I; 36) and
# over GF(25) (52) and GF(49) (100), none known here (92, odd).
FACTORS = {
    **{1: 1, 2: 1, 64: 1, 128: 1, 12: 12, 96: 12, 1536: 12, 3072: 12, 20: 20, 80: 20, 88: 44},
    **{224: 28, 36: 36, 576: 36, 104: 52, 100: 100, 200: 100, 60: 60, 120: 60},
    **{3: None, 6: None, 7: None, 33: None, 92: None, 130: None},
}


@pytest.mark.parametrize("dim", FACTORS)
def test_hadamard_factor_has_the_least_known_order_and_orthogonal_rows(dim: int) -> None:
    factor, order = hadamard_factor(dim), FACTORS[dim]
    if factor is None or order is None:
        assert (factor is None) == (order is None)
        return
    assert factor.shape == (order, order)
    assert (np.abs(factor) == 1).all()
    assert np.array_equal(factor @ factor.T, order * np.eye(order))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [1, 2, 3, 7, 20, 60, 64, 80, 96, 100, 128, 576])
def test_rotation_is_orthogonal(dim: int, kind: RotationKind) -> None:
    rotation = Rotation(dim, kind, seed=5)
    matrix = rotation.rotate(torch.eye(dim))
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(dim), rtol=0, atol=2e-6)
    back = rotation.rotate(matrix, inverse=True)
    torch.testing.assert_close(back, torch.eye(dim), rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_changes_the_rotation(kind: RotationKind) -> None:
    x = gaussian_vectors(1, 64, seed=0)
    rotated = Rotation(64, kind, seed=0).rotate(x)
    other: RotationKind = "hadamard" if kind == "orthogonal" else "orthogonal"
    assert torch.equal(Rotation(64, kind, seed=0).rotate(x), rotated)
    assert not torch.allclose(Rotation(64, kind, seed=1).rotate(x), rotated)
    assert not torch.allclose(Rotation(64, other, seed=0).rotate(x), rotated)


def test_random_bits_are_the_same_everywhere() -> None:
    # Files written on one machine are read on another: this stream is part of the format.
    assert [hex(word) for word in random_bits(2, 0, 128, 0)] == [
        "0xa1fa746b7bcf88a7",
        "0x551717d4bb928db2",
    ]
    assert Rotation(4, seed=3).turns(CPU).tolist() == [
        [[0.5906184911727905, 0.9998758435249329], [-0.8069509267807007, -0.015757044777274132]],
        [[-0.37554922699928284, 0.30011484026908875], [0.9268024563789368, 0.953903079032898]],
        [[0.8230694532394409, -0.7037754058837891], [0.5679407715797424, -0.7104225158691406]],
    ]


def test_turns_are_rotations_of_all_angles() -> None:
    cosine, sine = Rotation(4096).turns(CPU).double().unbind(1)
    torch.testing.assert_close(cosine**2 + sine**2, torch.ones_like(sine), rtol=0, atol=2e-7)
    # Four-fold symmetry: the first three harmonics of a uniform angle, and no two alike.
    angles = torch.atan2(sine, cosine).flatten()
    for harmonic in (1, 2, 3):
        assert abs(torch.exp(1j * harmonic * angles).mean()) < 0.04
    assert len(angles.unique()) == len(angles)


def test_gaussian_has_the_moments_of_one() -> None:
    draws = gaussian(200, 501, 7, 1)
    assert draws.shape == (200, 501)
    assert abs(draws.mean()) < 0.013
    assert draws.var() == pytest.approx(1, abs=0.018)
    assert (draws**4).mean() == pytest.approx(3, abs=0.12)
    assert np.corrcoef(draws[:100].ravel(), draws[100:].ravel())[0, 1] < 0.02


def test_haar_is_uniform_in_sign_and_size() -> None:
    matrices = np.stack([haar(4, seed) for seed in range(2_000)])
    assert np.abs(matrices.mean(0)).max() < 4 * (0.25 / 2_000) ** 0.5
    assert (matrices**2).mean(0) == pytest.approx(0.25, abs=0.02)
    # E q⁴ = 3 / (dim·(dim + 2)); without sign-fixing, the diagonal is biased.
    assert (matrices**4).mean(0) == pytest.approx(3 / 24, abs=0.02)


@pytest.mark.parametrize(
    "arguments",
    [(0,), (-4,), (2.5,), (8, "identity"), (8, "hadamard", -1), (8, "hadamard", 1.5)],
)
@pytest.mark.usefixtures("unhooked")
def test_bad_fields_are_refused(arguments: tuple[object, ...]) -> None:
    with pytest.raises(SixfoldError, match=r"must (be|not)"):
        Rotation(*arguments)  # type: ignore[arg-type]
