"""QJL: inner products from the signs of random projections."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from sixfold._surroundings import outside_autocast, outside_inference_mode, untraced
from sixfold.arguments import MOST_COORDINATES, MOST_SEED, choice, settle, whole
from sixfold.codes import QJLCodes, checked
from sixfold.kernels._codewords import expand
from sixfold.kernels._tiles import tiles
from sixfold.kernels._wide import wide
from sixfold.kernels.scores import scores
from sixfold.packing import decode_scale, encode_scale, pack
from sixfold.quantizers._checks import check_queries, check_vectors
from sixfold.quantizers._normalize import normalize
from sixfold.rotation import gaussian, haar

Projection: TypeAlias = Literal["orthogonal", "gaussian"]

# Keeps the projections apart from the rotation of the same seed and dimension.
_STREAM = 2


@lru_cache(maxsize=64)
@outside_inference_mode
def _projection(
    dim: int, projections: int, kind: Projection, seed: int, device: torch.device
) -> Float32[Tensor, "{projections} {dim}"]:
    """S, with rows of E‖row‖² = dim: Gaussian, or orthogonal within each block of `dim` rows."""
    if kind == "gaussian":
        rows = gaussian(projections, dim, seed, dim, _STREAM, 0)
    else:
        blocks = range(-(-projections // dim))
        stacked = [haar(dim, seed, dim, _STREAM, 1, block) for block in blocks]
        rows = math.sqrt(dim) * np.concatenate(stacked)[:projections]
    return torch.tensor(rows, dtype=torch.float32, device=device)


def _mean_magnitude(dim: int, kind: Projection) -> float:
    """E|⟨row, x⟩| of a unit vector: what turns signs back into inner products."""
    if kind == "gaussian":
        return math.sqrt(2 / math.pi)
    # One coordinate of a uniform point on the sphere of radius sqrt(dim).
    return math.sqrt(dim / math.pi) * math.exp(math.lgamma(dim / 2) - math.lgamma((dim + 1) / 2))


@dataclass(frozen=True)
class QJL:
    """One-bit quantized Johnson-Lindenstrauss transform: sign(S·x) and ‖x‖.

    Attributes:
        dim: Coordinates per vector, at least 1.
        projections: Rows of S, that is bits per vector; any positive number.
        projection: `"orthogonal"`: rows orthogonal within each block of `dim`, uniform on the
            sphere; roughly a third of the variance at `projections` = `dim`. `"gaussian"`:
            independent, as in the theory.
        seed: Of S.

    Raises:
        SixfoldError: A field has none of the values above.

    Source: arXiv:2406.03482, Definition 1 and Lemma 2.
    """

    dim: int
    projections: int
    projection: Projection = "orthogonal"
    seed: int = 0

    def __post_init__(self) -> None:
        settle(
            self,
            dim=whole("dim", self.dim, 1, MOST_COORDINATES),
            projections=whole("projections", self.projections, 1, MOST_COORDINATES),
            projection=choice("projection", self.projection, get_args(Projection)),
            seed=whole("seed", self.seed, most=MOST_SEED),
        )

    def _matrix(self, device: torch.device) -> Tensor:
        return _projection(self.dim, self.projections, self.projection, self.seed, device)

    @property
    def _weight(self) -> float:
        return 1 / (self.projections * _mean_magnitude(self.dim, self.projection))

    @untraced
    @outside_autocast
    def encode(self, x: Float[Tensor, "*batch dim"]) -> QJLCodes:
        """Compress vectors to `projections` signs and a 16-bit norm.

        Args:
            x: Vectors, any floating dtype; computed in float32. Lengths from 1e-26 to 1e29 are
                kept, others cut to that range or zero.

        Raises:
            ShapeError: The last axis of `x` is not `dim`.
            SixfoldError: `x` is not of a floating dtype.
        """
        check_vectors(x, self.dim)
        dtype, batch = wide(x.device), x.shape[:-1]
        matrix = self._matrix(x.device).mT.to(dtype)
        vectors = x.reshape(batch.numel(), self.dim)
        packed, norms = [], []
        for tile in tiles(len(vectors), max(self.dim, self.projections)):
            norm, unit = normalize(vectors[tile])
            # float64, so that the sign of a sum does not depend on the order of its terms.
            packed.append(pack((unit.to(dtype) @ matrix > 0).to(torch.uint8), 1))
            norms.append(encode_scale(norm))
        rows = torch.cat(packed)
        return QJLCodes(self, rows.view(*batch, rows.shape[-1]), torch.cat(norms).view(batch))

    @untraced
    @outside_autocast
    def decode(self, codes: QJLCodes) -> Float32[Tensor, "*batch dim"]:
        """Reconstruct vectors without bias: ‖x‖·Sᵀ·sign(S·x) / (projections·E|⟨row, x⟩|).

        Raises:
            SixfoldError: Another quantizer made the codes.
        """
        codes = checked(codes, QJLCodes, self)
        signs = expand(codes.packed, _signs(codes.device), dim=self.projections, bits=1)
        norms = decode_scale(codes.norms)[..., None]
        # float64, so that a vector decodes the same alone and among others.
        dtype = wide(codes.device)
        units = (signs.to(dtype) @ self._matrix(codes.device).to(dtype)).float()
        return units * (norms * self._weight)

    @untraced
    @outside_autocast
    def scores(
        self, queries: Float[Tensor, "*batch n_queries dim"], codes: QJLCodes
    ) -> Float32[Tensor, "*batch n_queries n"]:
        """Estimate ⟨query, x⟩ without bias; queries are projected but not quantized.

        Raises:
            ShapeError: Queries and codes do not share their batch axes.
            SixfoldError: Another quantizer made the codes, or devices differ.
        """
        codes = checked(codes, QJLCodes, self)
        check_queries(queries, codes)
        projected = queries.float() @ self._matrix(codes.device).mT * self._weight
        return scores(projected, codes.packed, codes.norms, _signs(codes.device), bits=1)


@lru_cache
@outside_inference_mode
def _signs(device: torch.device) -> Float32[Tensor, " 2"]:
    return torch.tensor([-1.0, 1.0], dtype=torch.float32, device=device)
