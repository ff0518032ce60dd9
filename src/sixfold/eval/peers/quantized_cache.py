"""transformers' `QuantizedCache` on its quanto and HQQ backends."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sixfold.errors import SixfoldError
from sixfold.eval.peers.scheme import Scheme
from sixfold.eval.peers.uniform import minmax

_HQQ_NORM = 0.7
_HQQ_BETA = 10.0
_HQQ_STEPS = 20


@dataclass(frozen=True)
class _Flushing(Scheme):
    """Groups of consecutive numbers, one group after another through the whole tensor.

    The prompt is quantized at once. Later tokens wait in the model's dtype until there are
    `residual_length` of them; then the whole history, as read back, is quantized again together
    with them. Defaults are those of transformers' documentation.

    Attributes:
        bits: Bits a code, 2 or 4.
        group_size: Numbers that share a scale and a zero point, both in the model's dtype.
        residual_length: Tokens that wait, at most one fewer.

    Source: `QuantizedLayer` of transformers 5.23.
    """

    requantizes: ClassVar[bool] = True
    peer: ClassVar[str]

    bits: int = 4
    group_size: int = 64
    residual_length: int = 128

    def due(self, coded: int, total: int) -> int:
        """All at first; later all again as soon as enough wait."""
        return total if coded == 0 or total - coded >= self.residual_length else coded

    def roundtrip(
        self, x: Float[Tensor, "batch heads tokens dim"], calibration: Tensor | None
    ) -> Float[Tensor, "batch heads tokens dim"]:
        """Quantize and read back in groups.

        Raises:
            SixfoldError: The numbers do not fill whole groups, which the original refuses too.
        """
        if x.numel() % self.group_size:
            raise SixfoldError(
                f"{self.peer} groups {self.group_size} numbers: expected a multiple of that in "
                f"all tokens together, got shape {tuple(x.shape)}"
            )
        return self._groups(x.reshape(-1, self.group_size)).view(x.shape)

    @abstractmethod
    def _groups(self, x: Float[Tensor, "groups size"]) -> Float[Tensor, "groups size"]: ...

    def nbytes(self, batch: int, heads: int, tokens: int, dim: int, element_size: int) -> int:
        """Codes, and two numbers a group."""
        numbers = batch * heads * tokens * dim
        return -(-numbers * self.bits // 8) + numbers // self.group_size * 2 * element_size


@dataclass(frozen=True)
class Quanto(_Flushing):
    """The quanto backend with its `axis=0`: minimum to maximum of every group.

    Source: optimum-quanto 0.2.7, `MaxOptimizer` and `quantize_affine`.
    """

    peer: ClassVar[str] = "quanto"

    def _groups(self, x: Float[Tensor, "groups size"]) -> Float[Tensor, "groups size"]:
        return minmax(x, self.bits)


@dataclass(frozen=True)
class HQQ(_Flushing):
    """The HQQ backend with `axis=1`, as documented for it: quanto's groups, fitted zero points.

    Source: hqq 0.2.8, `Quantizer.quantize` with its default (proximal) optimization, as on a CPU.
    """

    peer: ClassVar[str] = "hqq"

    def _groups(self, x: Float[Tensor, "groups size"]) -> Float[Tensor, "groups size"]:
        exact, top = x.float(), 2**self.bits - 1
        scale, zero = _initial_affine(exact, top)
        zero = _fitted_zero(exact, scale, zero, top)
        codes = (exact * scale + zero).round().clamp(0, top)
        # What is stored is the inverse of the scale, in the model's dtype like the zero point.
        return (codes.to(x.dtype) - zero.to(x.dtype)) * (1 / scale).to(x.dtype)


def _initial_affine(x: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Codes a unit and the zero point of every group, from its extremes."""
    low = x.amin(1, keepdim=True)
    width = x.amax(1, keepdim=True) - low
    scale = torch.where(width <= 1e-4, 1.0, top / width).clamp(max=2e4)
    return scale, -low * scale


def _fitted_zero(x: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """The zero points that make the errors sparse: steps in the 0.7-norm, while they help."""
    best = torch.inf
    for _ in range(_HQQ_STEPS):
        codes = (x * scale + zero).round().clamp(0, top)
        error = x - (codes - zero) / scale
        magnitude = error.abs()
        # The proximal step: what remains of an error is its sparse part.
        shrunk = magnitude - (1 / _HQQ_BETA) * magnitude.pow(_HQQ_NORM - 1)
        kept = shrunk.clamp(min=0) * error.sign()
        zero = (codes - (x - kept) * scale).mean(1, keepdim=True)
        if not (mean := float(magnitude.mean())) < best:
            break
        best = mean
    return zero
