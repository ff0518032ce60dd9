"""fp8 e4m3 with a scale for the whole tensor: transformers' `Fp8QuantizedLayer`."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sixfold.eval.peers.scheme import Scheme

_LARGEST = torch.finfo(torch.float8_e4m3fn).max
_FLOAT32 = 4


def to_e4m3(x: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """Round to the nearest e4m3 number; what is too large becomes the largest, 448."""
    return x.clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn).float()


@dataclass(frozen=True)
class Fp8(Scheme):
    """One byte a value, in units of a scale that the first chunk's largest value fixes.

    Later tokens beyond that value saturate. In transformers they become NaN: PyTorch's cast does
    not saturate, and one such token would end the measurement.

    Source: `Fp8QuantizedLayer` of transformers 5.23; vLLM's `kv_cache_dtype="fp8"` is the same
    arithmetic with a scale of 1 or one from the checkpoint.
    """

    def calibrate(self, first: Float[Tensor, "batch heads tokens dim"]) -> Tensor:
        """The scale."""
        scale = first.abs().amax().float() / _LARGEST
        return scale.clamp(min=torch.finfo(torch.float32).tiny)

    def roundtrip(
        self, x: Float[Tensor, "batch heads tokens dim"], calibration: Tensor | None
    ) -> Float[Tensor, "batch heads tokens dim"]:
        """Cast there and back."""
        assert calibration is not None
        return to_e4m3(x.float() / calibration) * calibration

    def nbytes(self, batch: int, heads: int, tokens: int, dim: int, element_size: int) -> int:
        """A byte a value and one float32."""
        return batch * heads * tokens * dim + _FLOAT32
