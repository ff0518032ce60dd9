"""Random rotations of any dimension, the same on every machine and torch version."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from sixfold._surroundings import outside_inference_mode
from sixfold.arguments import MOST_COORDINATES, MOST_SEED, choice, settle, whole
from sixfold.arguments import device as checked_device
from sixfold.hadamard import hadamard_factor
from sixfold.kernels._dispatch import untraced_without_kernels
from sixfold.kernels.rotate import rotate

RotationKind: TypeAlias = Literal["hadamard", "orthogonal"]

_Array: TypeAlias = npt.NDArray[np.floating]

# After one round a one-hot vector has two magnitudes, after two its law has tails too heavy for the
# codebook; after three, all vectors that were tried lose what they lose under a uniformly random
# rotation (kernels/rotate/README.md).
_ROUNDS = 3

# Last part of the generator's key: other draws of the same seed and dimension differ in it.
_TURN_STREAM, _DENSE_STREAM = 0, 1


def random_bits(count: int, seed: int, *key: int) -> npt.NDArray[np.uint64]:
    """Raw Philox output, whose stream numpy promises never to change (`Generator`'s may)."""
    sequence = np.random.SeedSequence([seed, *key])
    return np.random.Philox(sequence).random_raw(count)


def gaussian(rows: int, columns: int, seed: int, *key: int) -> _Array:
    """Independent standard normals [rows, columns], by Box-Muller from raw bits."""
    pairs = -(-rows * columns // 2)
    uniform = ((random_bits(2 * pairs, seed, *key) >> np.uint64(11)) + 0.5) * 2.0**-53
    radius = np.sqrt(-2 * np.log(uniform[:pairs]))
    angle = 2 * math.pi * uniform[pairs:]
    normals = np.concatenate((radius * np.cos(angle), radius * np.sin(angle)))
    return normals[: rows * columns].reshape(rows, columns)


def haar(dim: int, seed: int, *key: int) -> _Array:
    """Orthogonal matrix [dim, dim] uniform over the group: QR of a Gaussian matrix.

    The signs of R's diagonal go into Q; without that the distribution is not uniform.
    """
    q, r = np.linalg.qr(gaussian(dim, dim, seed, *key))
    return q * np.where(np.diag(r) < 0, -1.0, 1.0)


def _random_turns(dim: int, seed: int) -> _Array:
    """Cosines and sines [rounds, 2, dim / 2] of independent angles.

    Points of a square, scaled to length 1: every operation is one that IEEE 754 rounds correctly,
    so that all machines get the same numbers (libm's cosines differ in the last bit). The angles
    have the symmetry of the square, which is all the mixing needs.
    """
    raw = random_bits(_ROUNDS * dim, seed, dim, _TURN_STREAM).reshape(_ROUNDS, 2, dim // 2)
    points = ((raw >> np.uint64(12)) + 0.5) * 2.0**-51 - 1
    turns: _Array = points / np.sqrt((points * points).sum(1, keepdims=True))
    return turns


def _arrays(dim: int, kind: RotationKind, seed: int) -> tuple[_Array, _Array]:
    factor = hadamard_factor(dim) if kind == "hadamard" and dim > 1 else None
    if factor is None:
        return np.ones((0, 2, dim // 2)), haar(dim, seed, dim, _DENSE_STREAM)
    return _random_turns(dim, seed), factor.astype(np.float64)


@lru_cache(maxsize=64)
@outside_inference_mode
def _tensors(
    dim: int, kind: RotationKind, seed: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    turns, factor = (
        torch.tensor(array, dtype=torch.float32, device=device)
        for array in _arrays(dim, kind, seed)
    )
    return turns, factor


def _known(device: Any) -> torch.device:
    return device if isinstance(device, torch.device) else checked_device(device)


def _turns(dim: int, kind: RotationKind, seed: int, device: torch.device) -> Tensor:
    return _tensors(dim, kind, seed, device)[0]


def _factor(dim: int, kind: RotationKind, seed: int, device: torch.device) -> Tensor:
    return _tensors(dim, kind, seed, device)[1]


# What `torch.compiler.assume_constant_result` does, without half of torch to import.
_turns._dynamo_marked_constant = _factor._dynamo_marked_constant = True  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Rotation:
    """A fixed random rotation R of vectors of `dim` coordinates.

    Attributes:
        dim: Coordinates per vector.
        kind: `"hadamard"`: three rounds of random plane rotations and a Hadamard matrix,
            O(dim·log dim); where no Hadamard matrix of order `dim` is at hand, silently the other
            kind.
            `"orthogonal"`: a uniformly random (Haar) dense matrix, as in the paper.
        seed: Rotations of different seeds are independent.

    Raises:
        SixfoldError: `dim` is below 1, `kind` unknown, or `seed` negative.

    Source: arXiv:2504.19874 Algorithm 1; Hadamard rounds as in arXiv:2404.00456 (QuaRot), with
    plane rotations for its random signs (kernels/rotate/README.md).
    """

    dim: int
    kind: RotationKind = "hadamard"
    seed: int = 0

    def __post_init__(self) -> None:
        settle(
            self,
            dim=whole("dim", self.dim, 1, MOST_COORDINATES),
            kind=choice("rotation", self.kind, get_args(RotationKind)),
            seed=whole("seed", self.seed, most=MOST_SEED),
        )

    def turns(self, device: torch.device) -> Float32[Tensor, "rounds 2 half"]:
        """Plane rotations of each round, as `kernels.rotate` takes them. Cached: do not modify."""
        return _turns(self.dim, self.kind, self.seed, _known(device))

    def factor(self, device: torch.device) -> Float32[Tensor, "m m"]:
        """±1 or dense factor, as `kernels.rotate` takes it. Cached: do not modify."""
        return _factor(self.dim, self.kind, self.seed, _known(device))

    @untraced_without_kernels
    def rotate(
        self, x: Float[Tensor, "*b {self.dim}"], inverse: bool = False
    ) -> Float32[Tensor, "*b {self.dim}"]:
        """R·x for every vector, or R⁻¹·x; norms and inner products stay."""
        return rotate(x, self.turns(x.device), self.factor(x.device), inverse)
