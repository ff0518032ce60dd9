"""TurboQuant for inner products: least-squares codes plus the signs of what they miss."""

from dataclasses import dataclass

from jaxtyping import Float, Float32
from torch import Tensor

from sixfold._surroundings import outside_autocast, untraced
from sixfold.arguments import settle
from sixfold.codes import ProdCodes, checked
from sixfold.errors import SixfoldError
from sixfold.packing import BITS, Bits, check_bits
from sixfold.quantizers._checks import check_queries, check_vectors
from sixfold.quantizers.mse import TurboQuantMSE
from sixfold.quantizers.qjl import QJL, Projection
from sixfold.rotation import Rotation, RotationKind


@dataclass(frozen=True)
class TurboQuantProd:
    """`bits` - 1 bits of `TurboQuantMSE` and one bit of `QJL` on the residual.

    The residual is taken from what is decoded, its 16-bit scale included, so the estimate is
    unbiased whatever the first stage lost. That stage stores its optimal scale in place of the
    paper's norm: the same bits, a smaller residual.

    Attributes:
        dim: Coordinates per vector, at least 1.
        bits: 1 (signs alone), 2, 3, 3.5, 4, 5, 6, 7 or 8 per coordinate.
        projection: Of the signs; see `QJL`. `"gaussian"` is the paper's.
        rotation: See `TurboQuantMSE`.
        seed: Of the rotation and the projection.

    Raises:
        SixfoldError: A field has none of the values above.

    Source: arXiv:2504.19874, Algorithm 2 and Theorem 2.
    """

    dim: int
    bits: Bits
    projection: Projection = "orthogonal"
    rotation: RotationKind = "hadamard"
    seed: int = 0

    def __post_init__(self) -> None:
        settle(self, bits=check_bits(self.bits))
        if self.bits != 1 and self.bits - 1 not in BITS:
            raise SixfoldError(f"bits - 1 must be 0 or one of {BITS}, got bits={self.bits!r}")
        # Made for their checks of the other fields.
        rotation = Rotation(self.dim, self.rotation, self.seed)
        settle(self, dim=rotation.dim, seed=rotation.seed)
        _ = self._qjl

    @property
    def _mse(self) -> TurboQuantMSE | None:
        if self.bits == 1:
            return None
        return TurboQuantMSE(self.dim, self.bits - 1, rotation=self.rotation, seed=self.seed)

    @property
    def _qjl(self) -> QJL:
        return QJL(self.dim, self.dim, self.projection, self.seed)

    @untraced
    @outside_autocast
    def encode(self, x: Float[Tensor, "*batch dim"]) -> ProdCodes:
        """Compress vectors to `bits` bits per coordinate, a scale and a residual norm.

        Args:
            x: Vectors, any floating dtype; computed in float32. Lengths from 1e-26 to 1e29 are
                kept, others cut to that range or zero.

        Raises:
            ShapeError: The last axis of `x` is not `dim`.
            SixfoldError: `x` is not of a floating dtype.
        """
        check_vectors(x, self.dim)
        if self._mse is None:
            return ProdCodes(self, self._qjl.encode(x), None)
        mse = self._mse.encode(x)
        return ProdCodes(self, self._qjl.encode(x - self._mse.decode(mse)), mse)

    @untraced
    @outside_autocast
    def decode(self, codes: ProdCodes) -> Float32[Tensor, "*batch dim"]:
        """Reconstruct vectors without bias (and with more variance than `TurboQuantMSE`).

        Raises:
            SixfoldError: Another quantizer made the codes.
        """
        codes = checked(codes, ProdCodes, self)
        residual = self._qjl.decode(codes.residual)
        if self._mse is None or codes.mse is None:
            return residual
        return self._mse.decode(codes.mse) + residual

    @untraced
    @outside_autocast
    def scores(
        self, queries: Float[Tensor, "*batch n_queries dim"], codes: ProdCodes
    ) -> Float32[Tensor, "*batch n_queries n"]:
        """Estimate ⟨query, x⟩ without bias, over projections, for any fixed x.

        Raises:
            ShapeError: Queries and codes do not share their batch axes.
            SixfoldError: Another quantizer made the codes, or devices differ.
        """
        codes = checked(codes, ProdCodes, self)
        check_queries(queries, codes)
        residual = self._qjl.scores(queries, codes.residual)
        if self._mse is None or codes.mse is None:
            return residual
        return self._mse.scores(queries, codes.mse) + residual
