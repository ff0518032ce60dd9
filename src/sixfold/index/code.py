"""How the vectors of an index are coded: all coordinates alike, or groups of them by variance."""

import dataclasses
import itertools
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple, Self

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from sixfold.cache.coder import Coder
from sixfold.codebooks import expected_mse
from sixfold.hadamard import hadamard_factor
from sixfold.kernels.rotate import rotate

CPU = torch.device("cpu")
BITS = (1, 2, 3, 4, 8)
# Sums of products of 8 bits must fit 32.
MOST_DIM = 2**16
# Up to here a rotation may be a dense matrix.
MOST_DENSE = 512
# A basis is a dense matrix, and its making takes the third power of its size.
MOST_FITTED = 8192
# Coordinates whose bits are chosen together.
BLOCK = 32
# So many vectors tell where they lie, and in which directions they vary.
NOTICED = 256
# Of the error without groups: what promises less of a gain may be chance.
WORTH = 0.9
# Entries of a basis are whole numbers of such parts of 1: see `in_basis`.
BASIS_STEPS = 2**21
# Distance from the mean, of a vector's length, that may be rounding.
EQUAL = 1e-7
# Fewer of a sample's half say nothing.
LEAST_HALF = 100
# Of a scale, which each group has for each vector.
SCALE_BITS = 16


class Group(NamedTuple):
    """Coordinates that follow each other, and the bits of each: 0 where they are not held.

    Attributes:
        width: How many.
        bits: 0, 1, 2, 3, 4 or 8.
    """

    width: int
    bits: int


@dataclasses.dataclass(frozen=True, eq=False)
class VectorCode:
    """Groups of coordinates, each rotated and coded by itself, in a basis of their own.

    Attributes:
        dim: Coordinates of a vector.
        bits: A coordinate, on average, scales included as those of one group are.
        seed: Of the rotations.
        groups: Of the coordinates in the basis, in order.
        basis: Orthonormal rows; None: the coordinates as they are.
    """

    dim: int
    bits: int
    seed: int
    groups: tuple[Group, ...]
    basis: Float64[Tensor, "dim dim"] | None = None

    @classmethod
    def plain(cls, dim: int, bits: int, seed: int) -> Self:
        """The code that knows nothing of the data."""
        return cls(dim, bits, seed, (Group(dim, bits),))

    @classmethod
    def fitted(cls, sample: Float32[Tensor, "n dim"], bits: int, seed: int) -> Self:
        """The code of least expected error, at as many bytes, for vectors like these.

        Principal axes of the sample; bits by the variance along them, each vector counted relative
        to its length, as errors of codes are. Variances are those of one half along axes of the
        other: a sample's own axes say too much of it, and the more so the smaller it is. Where
        groups promise little, it is the plain code.

        Source: reverse water-filling (Cover and Thomas, Elements of Information Theory, 10.3).
        """
        plain = cls.plain(sample.shape[1], bits, seed)
        moved = _directions(sample)
        halves = _halves(moved)
        if len(halves[0]) < LEAST_HALF:
            return plain
        found = sum(
            (other @ _axes(half)).square().mean(0)
            for half, other in zip(halves, reversed(halves), strict=True)
        )
        assert isinstance(found, Tensor)
        groups = _by_variance(found, plain.dim * bits)
        if _lost(found, groups) > WORTH * _lost(found, plain.groups):
            return plain
        basis = (_axes(moved).mT * BASIS_STEPS).round() / BASIS_STEPS
        return cls(plain.dim, bits, seed, groups, basis.contiguous())

    @cached_property
    def coders(self) -> tuple[Coder, ...]:
        """One for each group that is held."""
        return tuple(
            Coder("key", coded_dim(width), bits, self.seed, "unbiased")
            for width, bits in self.groups
            if bits
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the basis."""
        return 0 if self.basis is None else self.basis.nbytes

    def in_basis(self, x: Float[Tensor, "n dim"]) -> Float32[Tensor, "n dim"]:
        """Coordinates in the basis: they do not depend on what comes along.

        Numbers of 24 bits by those of the basis are summed in float64, all of whose sums are exact.
        """
        if self.basis is None:
            return x.float()
        if not len(x):
            return x.new_empty(0, self.dim, dtype=torch.float32)
        most = x.abs().amax(1, keepdim=True).double()
        # A power of two, by an exact division.
        step = torch.where(most > 0, most / torch.frexp(most).mantissa, 1.0) * 2.0**-24
        turned: Tensor = ((x.double() / step).round() @ self.basis.mT * step).float()
        return turned

    def from_basis(self, x: Float32[Tensor, "n dim"]) -> Float32[Tensor, "n dim"]:
        """What `in_basis` was given."""
        return x if self.basis is None else (x.double() @ self.basis).float()

    def split(self, x: Float32[Tensor, "n dim"]) -> list[Float32[Tensor, "n coded"]]:
        """What of vectors in the basis is coded, zeros behind where more coordinates are coded."""
        if len(self.groups) == 1:
            return [_padded(x, self.coders[0].dim)]
        every = x.split([width for width, _ in self.groups], 1)
        held = [part for part, (_, bits) in zip(every, self.groups, strict=True) if bits]
        return [_padded(x, coder.dim) for x, coder in zip(held, self.coders, strict=True)]

    def rotated(self, x: Float32[Tensor, "n dim"]) -> Float32[Tensor, "n coordinates"]:
        """What codes are multiplied with: the groups' coordinates one after another."""
        codings = [coder.coding(CPU) for coder in self.coders]
        parts = zip(self.split(x), codings, strict=True)
        turned: list[Tensor] = [rotate(part, c.turns, c.factor) for part, c in parts]
        return turned[0] if len(turned) == 1 else torch.cat(turned, 1)

    def joined(self, parts: list[Float32[Tensor, "n coded"]]) -> Float32[Tensor, "n dim"]:
        """Vectors in the basis from what is coded of them, zeros where nothing is."""
        held = iter(parts)
        like = parts[0]
        found = [
            next(held)[:, :width] if bits else like.new_zeros(len(like), width)
            for width, bits in self.groups
        ]
        return torch.cat(found, 1)

    def unlike(self, x: Float32[Tensor, "n dim"]) -> str | None:
        """Why vectors, in the basis, are coded worse than without it; None where they are not."""
        energy = _directions(x).square().sum(0)
        plain = _lost(energy, self.plain(self.dim, self.bits, self.seed).groups)
        if WORTH * _lost(energy, self.groups) <= plain:
            return None
        return (
            "these vectors vary in other directions than the sample that the index was calibrated "
            "with: they are found less well than without. Calibrate an index with some of them."
        )


def _padded(x: Float32[Tensor, "n dim"], dim: int) -> Float32[Tensor, "n {dim}"]:
    more = dim - x.shape[1]
    return torch.nn.functional.pad(x, (0, more)) if more else x


def distortion(width: int, bits: int) -> float:
    """Squared error of a group of this width, of its energy."""
    return expected_mse(coded_dim(width), bits) if bits else 1.0


def coded_dim(dim: int) -> int:
    """Coordinates that are coded, zeros behind those of a vector: as many as rotate fast."""
    while dim > MOST_DENSE and hadamard_factor(dim) is None:
        dim += 1
    return dim


def _directions(x: Float32[Tensor, "n dim"]) -> Float64[Tensor, "some dim"]:
    """Vectors of length 1 to those that are not all but equal to the mean."""
    wide = x.double()
    moved = wide - wide.mean(0)
    length = torch.linalg.vector_norm(moved, dim=1, keepdim=True)
    far = length.squeeze(1) > EQUAL * torch.linalg.vector_norm(wide, dim=1)
    found: Tensor = moved[far] / length[far]
    return found


def _halves(
    moved: Float64[Tensor, "n dim"],
) -> tuple[Float64[Tensor, "half dim"], Float64[Tensor, "rest dim"]]:
    """Two halves of vectors of length 1, those that are much alike, or opposite, in the same one.

    By how far they reach along any one direction, in which alone the halves differ.
    """
    generator = torch.Generator().manual_seed(0)
    along = torch.randn(moved.shape[1], generator=generator, dtype=moved.dtype, device=CPU)
    lower, upper = moved[(moved @ along).abs().argsort(stable=True)].tensor_split(2)
    return lower, upper


def _axes(moved: Float64[Tensor, "n dim"]) -> Float64[Tensor, "dim dim"]:
    """Principal axes, columns, of descending variance."""
    axes: Tensor = torch.linalg.eigh(moved.mT @ moved).eigenvectors.flip(1)
    return axes


def _lost(energy: Float64[Tensor, " dim"], groups: Sequence[Group]) -> float:
    """Squared error expected of coordinates of this energy."""
    every = energy.split([width for width, _ in groups])
    return sum(
        float(part.sum()) * distortion(*group) for part, group in zip(every, groups, strict=True)
    )


def _by_variance(variances: Float64[Tensor, " dim"], budget: int) -> tuple[Group, ...]:
    """Bits for blocks of coordinates, of descending variance, that take at most `budget` bits."""
    widths = [len(block) for block in variances.split(BLOCK)]
    energy = [float(block.sum()) for block in variances.split(BLOCK)]
    chosen = [0] * len(widths)
    while True:
        best = None
        for i, before in enumerate(chosen):
            for bits in BITS:
                # Bits never rise from a block to the next.
                if bits <= before or (i > 0 and bits > chosen[i - 1]):
                    continue
                cost = (bits - before) * widths[i]
                more = [*chosen[:i], bits, *chosen[i + 1 :]]
                if _size(more, widths) > budget:
                    continue
                gain = energy[i] * (distortion(BLOCK, before) - distortion(BLOCK, bits)) / cost
                if best is None or gain > best[0]:
                    best = gain, more
        if best is None:
            break
        chosen = best[1]
    runs = itertools.groupby(zip(chosen, widths, strict=True), lambda pair: pair[0])
    return tuple(Group(sum(width for _, width in run), bits) for bits, run in runs)


def _size(chosen: list[int], widths: list[int]) -> int:
    coded = sum(bits * width for bits, width in zip(chosen, widths, strict=True))
    return coded + SCALE_BITS * (len(set(chosen) - {0}) - 1)
