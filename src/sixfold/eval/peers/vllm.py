"""vLLM's TurboQuant presets: Lloyd-Max keys after a plain Hadamard, uniform values.

vLLM also leaves the first two and the last two layers of a model uncompressed. That is a choice
of layers, not of codes, and would leave nothing of a model of four: it is not simulated.

Source: vLLM 0.33, `TurboQuantConfig`, `triton_turboquant_store` and `triton_turboquant_decode`.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from sixfold._surroundings import outside_inference_mode
from sixfold.errors import SixfoldError
from sixfold.eval.peers.fp8 import to_e4m3
from sixfold.eval.peers.llama_cpp import hadamard
from sixfold.eval.peers.scheme import Scheme, per_vector, require_multiple

_STEPS, _INTERVALS, _REACH = 200, 200, 3.5
_LEAST_SCALE = 1e-8


@dataclass(frozen=True)
class VllmKeys(Scheme):
    """Direction: rotated, Lloyd-Max codes of a Gaussian, normalized when read; length: 16 bits.

    Attributes:
        bits: Bits a coordinate.
    """

    bits: int

    def roundtrip(
        self, x: Float[Tensor, "batch heads tokens dim"], calibration: Tensor | None
    ) -> Float[Tensor, "batch heads tokens dim"]:
        """Quantize the direction and read it back at the stored length.

        Raises:
            SixfoldError: The head dimension is no power of two of 16 or more.
        """
        dim, exact = x.shape[-1], x.float()
        if dim < 16 or dim & (dim - 1):
            raise SixfoldError(
                "vLLM's rotated presets work for head dimensions that are a power of two of 16 "
                f"or more, got {dim}; leave them out for this model"
            )
        norm = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
        book = gaussian_levels(dim, self.bits).to(x.device)
        rotated = hadamard(exact / (norm + 1e-8), dim)
        read = book[torch.bucketize(rotated, (book[1:] + book[:-1]) / 2, right=True)]
        read = read / (read.square().sum(-1, keepdim=True) + 1e-16).sqrt()
        back: Tensor = hadamard(read, dim) * norm.half().float()
        return back

    def nbytes(self, batch: int, heads: int, tokens: int, dim: int, element_size: int) -> int:
        """Codes and a 16-bit norm a token and head; the whole slot is even without padding."""
        return batch * heads * tokens * per_vector(self.bits, dim, scales=1)


@dataclass(frozen=True)
class VllmFp8Keys(Scheme):
    """Keys cast to e4m3 as they are."""

    def roundtrip(
        self, x: Float[Tensor, "batch heads tokens dim"], calibration: Tensor | None
    ) -> Float[Tensor, "batch heads tokens dim"]:
        """Cast there and back."""
        return to_e4m3(x.float())

    def nbytes(self, batch: int, heads: int, tokens: int, dim: int, element_size: int) -> int:
        """A byte a value."""
        return batch * heads * tokens * dim


@dataclass(frozen=True)
class VllmValues(Scheme):
    """Minimum to maximum of one token's vector; scale and minimum are rounded to 16 bits after.

    Attributes:
        bits: Bits a coordinate.
    """

    bits: int

    def roundtrip(
        self, x: Float[Tensor, "batch heads tokens dim"], calibration: Tensor | None
    ) -> Float[Tensor, "batch heads tokens dim"]:
        """Quantize and read back, token by token."""
        require_multiple(x.shape[-1], 8, "vLLM's TurboQuant")
        exact, top = x.float(), 2**self.bits - 1
        low = exact.amin(-1, keepdim=True)
        scale = ((exact.amax(-1, keepdim=True) - low) / top).clamp(min=_LEAST_SCALE)
        codes = ((exact - low) / scale + 0.5).floor().clamp(0, top)
        read: Tensor = codes * scale.half().float() + low.half().float()
        return read

    def nbytes(self, batch: int, heads: int, tokens: int, dim: int, element_size: int) -> int:
        """Codes and two 16-bit numbers a token and head."""
        return batch * heads * tokens * per_vector(self.bits, dim, scales=2)


@lru_cache
@outside_inference_mode
def gaussian_levels(dim: int, bits: int) -> Float32[Tensor, " levels"]:
    """Levels for N(0, 1/dim) as vLLM finds them: Lloyd's iteration from equally spaced ones.

    200 steps and the trapezoidal rule on 200 intervals a cell: close to the optimum, not at it.
    """
    sigma = 1 / math.sqrt(dim)
    reach, count = _REACH * sigma, 2**bits
    levels = -reach + 2 * reach * (np.arange(count) + 0.5) / count
    for _ in range(_STEPS):
        edges = np.concatenate([[-3 * reach], (levels[1:] + levels[:-1]) / 2, [3 * reach]])
        x = np.linspace(edges[:-1], edges[1:], _INTERVALS + 1)
        density = np.exp(-0.5 * (x / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
        mass = _integral(density, x)
        mean = _integral(x * density, x) / np.maximum(mass, 1e-300)
        found = np.where(mass > 1e-15, mean, levels)
        converged = np.abs(found - levels).max() < 1e-10
        if converged:
            break
        levels = found
    return torch.tensor(levels, dtype=torch.float32, device="cpu")


def _integral(y: npt.NDArray[np.float64], x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    # NumPy has called its own `trapezoid` since version 2 alone.
    found: npt.NDArray[np.float64] = ((y[1:] + y[:-1]) / 2 * np.diff(x, axis=0)).sum(0)
    return found
