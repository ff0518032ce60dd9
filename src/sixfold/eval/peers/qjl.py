"""QJL: signs of projected keys, with outlier channels apart; 2-bit values."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from sixfold._surroundings import outside_inference_mode
from sixfold.eval.peers.scheme import FLOAT16, Scheme
from sixfold.rotation import haar


@lru_cache
@outside_inference_mode
def _projection(dim: int, bits: int) -> Float32[Tensor, "{bits} {dim}"]:
    """Rows of length sqrt(dim), orthogonal within each block of `dim` of them."""
    blocks = [haar(dim, 0, dim, block) for block in range(-(-bits // dim))]
    rows = math.sqrt(dim) * np.concatenate(blocks)[:bits]
    return torch.tensor(rows, dtype=torch.float32, device="cpu")


@dataclass(frozen=True)
class QJLKeys(Scheme):
    """Signs of two projections of a key: of its outlier channels, and of all others.

    Reading back is linear in the signs, so attention to what is read back computes the original's
    estimate of every logit. Each part keeps its 16-bit norm.

    Attributes:
        bits: Signs a coordinate, of either part.
        outliers: Channels of largest norm in a group of tokens.
        group_size: Tokens that share their outlier channels, a byte each.
        buffer_size: Tokens that wait until there are as many.

    Source: arXiv:2406.03482 and `run_longbench.py` of amirzandieh/QJL: 256 signs of 128
    coordinates for either part (the first 15 of 32 layers, which take 512 there, take no more
    here), orthogonal projections, scaled like Gaussian ones.
    """

    bits: int = 2
    outliers: int = 8
    group_size: int = 32
    buffer_size: int = 128

    def due(self, coded: int, total: int) -> int:
        """Whole buffers."""
        return total - total % self.buffer_size

    def roundtrip(
        self, x: Float[Tensor, "batch heads tokens dim"], calibration: Tensor | None
    ) -> Float[Tensor, "batch heads tokens dim"]:
        """Project, take signs and project back, group by group of tokens."""
        groups = x.float().unflatten(-2, (-1, self.group_size))
        chosen = torch.linalg.vector_norm(groups, dim=-2).topk(self.outliers, dim=-1).indices
        mask = torch.zeros_like(groups[..., 0, :]).scatter(-1, chosen, 1.0)[..., None, :]
        outlying = mask * self._read(groups * mask)
        return ((1 - mask) * self._read(groups * (1 - mask)) + outlying).flatten(-3, -2)

    def _read(self, part: Tensor) -> Tensor:
        dim = part.shape[-1]
        matrix = _projection(dim, self.bits * dim).to(part.device)
        signs = torch.where(part @ matrix.mT > 0, 1.0, -1.0)
        norm = torch.linalg.vector_norm(part, dim=-1, keepdim=True).half().float()
        back: Tensor = signs @ matrix * norm * math.sqrt(math.pi / 2) / (self.bits * dim)
        return back

    def nbytes(self, batch: int, heads: int, tokens: int, dim: int, element_size: int) -> int:
        """Signs and a norm of either part a token; the outlier channels of every group."""
        token = 2 * (-(-self.bits * dim // 8) + FLOAT16)
        return batch * heads * (tokens * token + tokens // self.group_size * self.outliers)
