"""Peers that are vector quantizers of this package: the papers' own variants of them."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from sixfold.eval.peers.scheme import FLOAT16, Scheme, per_vector
from sixfold.packing import Bits
from sixfold.quantizers import OutlierSplit, PolarQuant, TurboQuantMSE, TurboQuantProd


@dataclass(frozen=True)
class PaperTurboQuant(Scheme):
    """TurboQuant with outlier channels: a quarter of them at one bit more than the others.

    The channels are those of largest norm over the first chunk, for every sequence and head, and
    stay; norms are stored as they are and rotations are dense, as in the paper. At a head
    dimension of 128, 3 and 2 bits with two norms make its "2.5 bits".

    Attributes:
        bits: Bits of the channels that are no outliers.

    Source: arXiv:2504.19874 §4.3. Keys and values alike, as its text has it (the authors' code
    stores values in another way).
    """

    bits: int

    def _quantizer(self, dim: int) -> OutlierSplit:
        return OutlierSplit(
            dim, dim // 4, self.bits + 1, self.bits, scale="norm", rotation="orthogonal"
        )

    def calibrate(self, first: Float[Tensor, "batch heads tokens dim"]) -> Tensor:
        """The outlier channels."""
        return self._quantizer(first.shape[-1]).choose_channels(first)

    def roundtrip(
        self, x: Float[Tensor, "batch heads tokens dim"], calibration: Tensor | None
    ) -> Float[Tensor, "batch heads tokens dim"]:
        """Encode and decode with the channels chosen at first."""
        quantizer = self._quantizer(x.shape[-1])
        return quantizer.decode(quantizer.encode(x, calibration))

    def nbytes(self, batch: int, heads: int, tokens: int, dim: int, element_size: int) -> int:
        """Codes and two 16-bit norms a token and head, and a byte for every outlier channel."""
        outliers = dim // 4
        bits = outliers * (self.bits + 1) + (dim - outliers) * self.bits
        return (
            batch * heads * (tokens * (-(-bits // 8) + 2 * FLOAT16) + (outliers if tokens else 0))
        )


@dataclass(frozen=True)
class PaperMSE(Scheme):
    """TurboQuant for least squared error, norm and dense rotation as in the paper.

    Attributes:
        bits: Bits a coordinate.

    Source: arXiv:2504.19874, Algorithm 1.
    """

    bits: Bits

    def roundtrip(
        self, x: Float[Tensor, "batch heads tokens dim"], calibration: Tensor | None
    ) -> Float[Tensor, "batch heads tokens dim"]:
        """Encode and decode."""
        quantizer = TurboQuantMSE(x.shape[-1], self.bits, scale="norm", rotation="orthogonal")
        return quantizer.decode(quantizer.encode(x))

    def nbytes(self, batch: int, heads: int, tokens: int, dim: int, element_size: int) -> int:
        """Codes and a 16-bit norm a token and head."""
        return batch * heads * tokens * per_vector(self.bits, dim, scales=1)


@dataclass(frozen=True)
class PaperProd(Scheme):
    """TurboQuant for inner products, with the paper's Gaussian projection; meant for keys.

    Reading back is linear in the signs, so attention to what is read back computes the paper's
    estimate of every logit.

    Attributes:
        bits: Bits a coordinate, one of them the sign of the projected residual.

    Source: arXiv:2504.19874, Algorithm 2 (with the optimal scale in place of the first stage's
    norm, see `TurboQuantProd`).
    """

    bits: Bits

    def roundtrip(
        self, x: Float[Tensor, "batch heads tokens dim"], calibration: Tensor | None
    ) -> Float[Tensor, "batch heads tokens dim"]:
        """Encode and decode."""
        quantizer = TurboQuantProd(
            x.shape[-1], self.bits, projection="gaussian", rotation="orthogonal"
        )
        return quantizer.decode(quantizer.encode(x))

    def nbytes(self, batch: int, heads: int, tokens: int, dim: int, element_size: int) -> int:
        """Codes, a scale and the norm of the residual a token and head, 16 bits each."""
        return batch * heads * tokens * per_vector(self.bits, dim, scales=2)


@dataclass(frozen=True)
class Polar(Scheme):
    """PolarQuant with 4, 2, 2 and 2 bits for the angles of its levels, generated tokens too.

    Source: arXiv:2502.02617 §4.
    """

    def roundtrip(
        self, x: Float[Tensor, "batch heads tokens dim"], calibration: Tensor | None
    ) -> Float[Tensor, "batch heads tokens dim"]:
        """Encode and decode."""
        quantizer = PolarQuant(x.shape[-1])
        return quantizer.decode(quantizer.encode(x))

    def nbytes(self, batch: int, heads: int, tokens: int, dim: int, element_size: int) -> int:
        """Per 16 coordinates 46 bits of angles and a 16-bit radius."""
        return batch * heads * tokens * -(-dim // 16) * (46 + 16) // 8
