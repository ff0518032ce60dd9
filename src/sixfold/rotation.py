"""Random rotations of any dimension, the same on every machine and torch version."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from sixfold.errors import SixfoldError
from sixfold.hadamard import hadamard_factor
from sixfold.kernels.rotate import rotate

RotationKind: TypeAlias = Literal["hadamard", "orthogonal"]

_Array: TypeAlias = npt.NDArray[np.floating]

# One round leaves a one-hot vector at ±1/sqrt(dim) in every coordinate, and two leave it on a
# lattice that four-bit levels resonate with; after three, all vectors that were tried lose what
# they lose under a uniformly random rotation (kernels/rotate/README.md).
_ROUNDS = 3

# Last part of the generator's key: other draws of the same seed and dimension differ in it.
_SIGN_STREAM, _DENSE_STREAM = 0, 1


def check_seed(seed: int) -> None:
    """Refuse seeds that the generator would.

    Raises:
        SixfoldError: `seed` is not a non-negative integer.
    """
    if not isinstance(seed, int) or seed < 0:
        raise SixfoldError(f"seed must be a non-negative integer, got {seed!r}")


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


@lru_cache(maxsize=64)
def _tensors(
    dim: int, kind: RotationKind, seed: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    signs, factor = _arrays(dim, kind, seed)
    # Tensors made in inference mode would stay barred from autograd for every later caller.
    with torch.inference_mode(False):
        return (
            torch.tensor(signs, dtype=torch.float32, device=device),
            torch.tensor(factor, dtype=torch.float32, device=device),
        )


def _arrays(dim: int, kind: RotationKind, seed: int) -> tuple[_Array, _Array]:
    # In one dimension the signs are all there is: kernels skip a factor of order 1.
    factor = hadamard_factor(dim) if kind == "hadamard" or dim == 1 else None
    if factor is None:
        return np.ones((1, dim)), haar(dim, seed, dim, _DENSE_STREAM)
    bits = random_bits(_ROUNDS * dim, seed, dim, _SIGN_STREAM) >> np.uint64(63)
    return 1.0 - 2.0 * bits.reshape(_ROUNDS, dim), factor


@dataclass(frozen=True)
class Rotation:
    """A fixed random rotation R of vectors of `dim` coordinates.

    Attributes:
        dim: Coordinates per vector.
        kind: `"hadamard"`: three rounds of random signs and a Hadamard matrix, O(dim·log dim);
            where no Hadamard matrix of order `dim` is at hand, silently the other kind.
            `"orthogonal"`: a uniformly random (Haar) dense matrix, as in the paper.
        seed: Rotations of different seeds are independent.

    Raises:
        SixfoldError: `dim` is below 1, `kind` unknown, or `seed` negative.

    Source: arXiv:2504.19874 Algorithm 1; Hadamard rounds as in arXiv:2404.00456 (QuaRot).
    """

    dim: int
    kind: RotationKind = "hadamard"
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.dim, int) or self.dim < 1:
            raise SixfoldError(f"dim must be a positive integer, got {self.dim!r}")
        if self.kind not in get_args(RotationKind):
            kinds = get_args(RotationKind)
            raise SixfoldError(f"rotation must be one of {kinds}, got {self.kind!r}")
        check_seed(self.seed)

    def signs(self, device: torch.device) -> Float32[Tensor, "rounds {self.dim}"]:
        """±1 flips of each round, as `kernels.rotate` takes them. Cached: do not modify."""
        return _tensors(self.dim, self.kind, self.seed, device)[0]

    def factor(self, device: torch.device) -> Float32[Tensor, "m m"]:
        """The orthonormal factor, as `kernels.rotate` takes it. Cached: do not modify."""
        return _tensors(self.dim, self.kind, self.seed, device)[1]

    def rotate(
        self, x: Float[Tensor, "*b {self.dim}"], inverse: bool = False
    ) -> Float32[Tensor, "*b {self.dim}"]:
        """R·x for every vector, or R⁻¹·x; norms and inner products stay."""
        return rotate(x, self.signs(x.device), self.factor(x.device), inverse)
