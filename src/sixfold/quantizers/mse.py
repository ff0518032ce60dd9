"""TurboQuant for least squared error: rotate, then quantize every coordinate alike."""

from dataclasses import dataclass
from typing import get_args

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from sixfold._surroundings import outside_autocast
from sixfold.arguments import choice, settle
from sixfold.codebooks import centroids
from sixfold.codes import MSECodes, checked
from sixfold.kernels import decode as decoding
from sixfold.kernels import encode as encoding
from sixfold.kernels import scores as scoring
from sixfold.kernels._dispatch import untraced_without_kernels
from sixfold.kernels.encode import Scale
from sixfold.packing import Bits, check_bits
from sixfold.quantizers._checks import check_queries, check_vectors
from sixfold.rotation import Rotation, RotationKind


@dataclass(frozen=True)
class TurboQuantMSE:
    """Random rotation and a Lloyd-Max codebook for the coordinates of a rotated vector.

    Attributes:
        dim: Coordinates per vector, at least 1.
        bits: 1, 2, 2.5, 3, 3.5, 4, 5, 6, 7 or 8 per coordinate.
        scale: The number stored with each vector. `"norm"`: its norm, as in the paper.
            `"optimal"`: what minimises the squared error. `"unbiased"`: what makes inner
            products unbiased over rotations; for search and attention keys.
        rotation: `"hadamard"` (fast) or `"orthogonal"` (the paper's dense matrix).
        seed: Of the rotation.

    Raises:
        SixfoldError: A field has none of the values above.

    Note:
        E‖x - decode(encode(x))‖² is `codebooks.expected_mse(dim, bits)`·‖x‖² with `"norm"`, at
        most (√3·π/2)·4^-bits·‖x‖², and a little less with `"optimal"`.

    Source: arXiv:2504.19874, Algorithm 1 and Theorem 1; scales from arXiv:2108.08842 (EDEN).
    """

    dim: int
    bits: Bits
    scale: Scale = "optimal"
    rotation: RotationKind = "hadamard"
    seed: int = 0

    def __post_init__(self) -> None:
        settle(
            self,
            bits=check_bits(self.bits),
            scale=choice("scale", self.scale, get_args(Scale)),
        )
        # Made for its checks of the other fields.
        settle(self, dim=self._rotation.dim, seed=self._rotation.seed)

    @property
    def _rotation(self) -> Rotation:
        return Rotation(self.dim, self.rotation, self.seed)

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        rotation, book = self._rotation, centroids(self.dim, self.bits, device)
        return rotation.turns(device), rotation.factor(device), book

    @untraced_without_kernels
    @outside_autocast
    def encode(self, x: Float[Tensor, "*batch dim"]) -> MSECodes:
        """Compress vectors to `bits` bits per coordinate and one 16-bit scale.

        Args:
            x: Vectors, any floating dtype; computed in float32. Scales are stored, so units
                survive: lengths from 1e-26 to 1e29, others are cut to that range or become
                zero. Zero vectors decode to zero, vectors with NaN or infinity to NaN.

        Returns:
            Codes of `bits + 16/dim` bits per coordinate (each bit plane of a vector is padded
            to 4 bytes).

        Raises:
            ShapeError: The last axis of `x` is not `dim`.
            SixfoldError: `x` is not of a floating dtype.
        """
        check_vectors(x, self.dim)
        packed, scales = encoding.encode(
            x, *self._tables(x.device), bits=self.bits, scale=self.scale
        )
        return MSECodes(self, packed, scales)

    @untraced_without_kernels
    @outside_autocast
    def decode(self, codes: MSECodes) -> Float32[Tensor, "*batch dim"]:
        """Reconstruct vectors, in the units of those encoded.

        Raises:
            SixfoldError: Another quantizer made the codes.
        """
        codes = checked(codes, MSECodes, self)
        tables = self._tables(codes.device)
        return decoding.decode(codes.packed, codes.scales, *tables, dim=self.dim, bits=self.bits)

    @untraced_without_kernels
    @outside_autocast
    def scores(
        self, queries: Float[Tensor, "*batch n_queries dim"], codes: MSECodes
    ) -> Float32[Tensor, "*batch n_queries n"]:
        """Estimate ⟨query, x⟩ straight from the codes; unbiased with `scale="unbiased"`.

        Raises:
            ShapeError: Queries and codes do not share their batch axes.
            SixfoldError: Another quantizer made the codes, or devices differ.
        """
        codes = checked(codes, MSECodes, self)
        check_queries(queries, codes)
        book = centroids(self.dim, self.bits, codes.device)
        rotated = self._rotation.rotate(queries)
        return scoring.scores(rotated, codes.packed, codes.scales, book, bits=self.bits)
