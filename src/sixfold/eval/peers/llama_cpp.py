"""llama.cpp's q4_0 and q8_0 caches: blocks of 32 coordinates, with and without its rotation."""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from sixfold.eval.peers.scheme import FLOAT16, Scheme, require_multiple

BlockType: TypeAlias = Literal["q4_0", "q8_0"]

BLOCK = 32
_BLOCK_BYTES: dict[BlockType, int] = {"q4_0": FLOAT16 + BLOCK // 2, "q8_0": FLOAT16 + BLOCK}


@dataclass(frozen=True)
class LlamaCpp(Scheme):
    """Blocks of one head's coordinates, each with a 16-bit scale; optionally rotated before.

    Attributes:
        type: `"q4_0"`: 16 levels of which the outermost meets the block's largest magnitude.
            `"q8_0"`: 8 bits from minus to plus that magnitude.
        rotation: Size of the Hadamard blocks, 0 for none. llama.cpp takes 64 for values and the
            largest power of two that divides the head dimension for keys (-1 here), if that
            dimension is a multiple of 64 and else does not rotate; nor does this.

    Source: `quantize_row_q4_0_ref` and `quantize_row_q8_0_ref` of ggml; rotation: llama.cpp pull
    request 21038.
    """

    type: BlockType
    rotation: int = 0

    def roundtrip(
        self, x: Float[Tensor, "batch heads tokens dim"], calibration: Tensor | None
    ) -> Float[Tensor, "batch heads tokens dim"]:
        """Rotate, quantize in blocks, read back, rotate back."""
        dim = x.shape[-1]
        require_multiple(dim, BLOCK, f"llama.cpp's {self.type}")
        size = self._hadamard_size(dim)
        rotated = hadamard(x.float(), size)
        blocks = rotated.unflatten(-1, (-1, BLOCK))
        read = _q4_0(blocks) if self.type == "q4_0" else _q8_0(blocks)
        return hadamard(read.flatten(-2), size)

    def _hadamard_size(self, dim: int) -> int:
        if self.rotation == 0 or dim % 64:
            return 1
        return dim & -dim if self.rotation < 0 else self.rotation

    def nbytes(self, batch: int, heads: int, tokens: int, dim: int, element_size: int) -> int:
        """18 bytes (q4_0) or 34 (q8_0) a block."""
        return batch * heads * tokens * dim // BLOCK * _BLOCK_BYTES[self.type]


def hadamard(x: Float[Tensor, "*b dim"], size: int) -> Float[Tensor, "*b dim"]:
    """Sylvester's Hadamard matrix of order `size`, orthonormal, on every block: its own inverse."""
    blocks, stride = x.unflatten(-1, (-1, size)), 1
    while stride < size:
        low, high = blocks.unflatten(-1, (-1, 2, stride)).unbind(-2)
        blocks = torch.stack((low + high, low - high), dim=-2).flatten(-3)
        stride *= 2
    rotated: Tensor = blocks.flatten(-2) / math.sqrt(size)
    return rotated


def _q4_0(x: Tensor) -> Tensor:
    extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    scale = extreme / -8
    codes = (x * _inverse(scale) + 8.5).floor().clamp(0, 15)
    return (codes - 8) * scale.half().float()


def _q8_0(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127
    scaled = x * _inverse(scale)
    # Half away from zero, as C rounds.
    codes = (scaled.abs() + 0.5).floor() * scaled.sign()
    return codes * scale.half().float()


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, 1 / scale)
