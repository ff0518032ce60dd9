"""KIVI: keys in groups along the tokens of a channel, values along the channels of a token."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from sixfold.eval.peers.scheme import Scheme, require_multiple
from sixfold.eval.peers.uniform import minmax


@dataclass(frozen=True)
class KiviKeys(Scheme):
    """Minimum to maximum of `group_size` tokens of one channel; whole windows become codes.

    Attributes:
        bits: Bits a code.
        group_size: Tokens that share a scale and a minimum, both in the model's dtype.
        residual_length: Tokens that wait until there are as many.

    Source: arXiv:2402.02750; `triton_quantize_and_pack_along_last_dim` of jy-yuan/KIVI.
    """

    bits: int
    group_size: int = 32
    residual_length: int = 128

    def due(self, coded: int, total: int) -> int:
        """Whole windows."""
        return total - total % self.residual_length

    def roundtrip(
        self, x: Float[Tensor, "batch heads tokens dim"], calibration: Tensor | None
    ) -> Float[Tensor, "batch heads tokens dim"]:
        """Quantize and read back, channel by channel."""
        groups = x.mT.unflatten(-1, (-1, self.group_size))
        read = minmax(groups, self.bits)
        return read.flatten(-2).mT

    def nbytes(self, batch: int, heads: int, tokens: int, dim: int, element_size: int) -> int:
        """Codes, and two numbers a group."""
        return _nbytes(batch * heads * tokens * dim, self.bits, self.group_size, element_size)


@dataclass(frozen=True)
class KiviValues(Scheme):
    """Minimum to maximum of `group_size` channels of one token, all but the last tokens.

    Attributes:
        bits: Bits a code.
        group_size: Channels that share a scale and a minimum, both in the model's dtype.
        residual_length: Last tokens that are no codes.

    Source: As `KiviKeys`.
    """

    bits: int
    group_size: int = 32
    residual_length: int = 128

    def due(self, coded: int, total: int) -> int:
        """All but the last tokens."""
        return max(coded, total - self.residual_length)

    def roundtrip(
        self, x: Float[Tensor, "batch heads tokens dim"], calibration: Tensor | None
    ) -> Float[Tensor, "batch heads tokens dim"]:
        """Quantize and read back, token by token."""
        require_multiple(x.shape[-1], self.group_size, "kivi")
        return minmax(x.unflatten(-1, (-1, self.group_size)), self.bits).flatten(-2)

    def nbytes(self, batch: int, heads: int, tokens: int, dim: int, element_size: int) -> int:
        """Codes, and two numbers a group."""
        return _nbytes(batch * heads * tokens * dim, self.bits, self.group_size, element_size)


def _nbytes(numbers: int, bits: int, group_size: int, element_size: int) -> int:
    return numbers * bits // 8 + numbers // group_size * 2 * element_size
