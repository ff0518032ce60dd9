"""How the vectors of one side of the cache, keys or values, become pages."""

import dataclasses
from functools import lru_cache

import torch
from torch import Tensor

from sixfold.cache.policy import CachePolicy, code_of
from sixfold.codebooks import centroids
from sixfold.kernels.types import CodeName, Coding, Scale, row_symbols
from sixfold.packing import PAGE_TOKENS, Bits, Layout, row_bytes
from sixfold.rotation import Rotation
from sixfold.trellis import PAGE_STATES, codewords

# Keys carry the scale that makes inner products unbiased, values the one of least squared error
# (EDEN, arXiv:2604.18555); each is stored in place of the norm, so neither costs a bit.
SCALES: dict[Layout, Scale] = {"key": "unbiased", "value": "optimal"}


@dataclasses.dataclass(frozen=True)
class Coder:
    """Rotation, code, scale and page layout of keys or of values."""

    layout: Layout
    dim: int
    bits: Bits
    seed: int
    scale: Scale
    code: CodeName = "codebook"

    @property
    def page_bytes(self) -> int:
        """Bytes of one head's codes of a page, without scales."""
        return PAGE_TOKENS * row_bytes(*row_symbols(self.dim, self.bits, self.code))

    def coding(self, device: torch.device) -> Coding:
        """The tables and numbers that kernels code with."""
        return _coding(self.dim, self.bits, self.seed, self.scale, self.code, device)

    def tables(self, device: torch.device) -> list[Tensor]:
        """Every tensor that coding needs beside the pages."""
        coding = self.coding(device)
        return [coding.turns, coding.factor, coding.centroids]


@lru_cache(maxsize=64)
def _coding(
    dim: int, bits: Bits, seed: int, scale: Scale, code: CodeName, device: torch.device
) -> Coding:
    """One for all heads, layers and sequences: a step asks for it twice a layer."""
    rotation = Rotation(dim, "hadamard", seed)
    if code == "trellis":
        book = codewords(PAGE_STATES, bits, device)
    else:
        book = centroids(dim, bits, device)
    return Coding(rotation.turns(device), rotation.factor(device), book, bits, dim, scale, code)


def coders(policy: CachePolicy, key_dim: int, value_dim: int) -> tuple[Coder, Coder]:
    """How `policy` codes keys, and values."""

    return (
        _coder(policy, "key", key_dim, policy.key_bits),
        _coder(policy, "value", value_dim, policy.value_bits),
    )


def _coder(policy: CachePolicy, layout: Layout, dim: int, bits: Bits) -> Coder:
    return Coder(layout, dim, bits, policy.seed, SCALES[layout], code_of(policy.code, dim, bits))
