"""How the vectors of one side of the cache, keys or values, become pages."""

import dataclasses
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from sixfold.cache.pages import Run, Slab
from sixfold.cache.policy import CachePolicy
from sixfold.codebooks import centroids
from sixfold.kernels.cached_attention import Coding
from sixfold.kernels.decode import decode_pages
from sixfold.kernels.encode import Scale, Side
from sixfold.packing import PAGE_TOKENS, Bits, n_symbols, row_bytes, symbol_bits
from sixfold.rotation import Rotation


@dataclasses.dataclass(frozen=True)
class Coder:
    """Rotation, codebook, scale and page layout of keys or of values.

    Keys carry the scale that makes inner products unbiased, values the one of least squared error
    (EDEN, arXiv:2604.18555); each is stored in place of the norm, so neither costs a bit.
    """

    layout: Literal["key", "value"]
    dim: int
    bits: Bits
    seed: int

    @property
    def page_bytes(self) -> int:
        """Bytes of one head's codes of a page, without scales."""
        return PAGE_TOKENS * row_bytes(n_symbols(self.dim, self.bits), symbol_bits(self.bits))

    @cached_property
    def rotation(self) -> Rotation:
        """The rotation shared by all heads, layers and sequences."""
        return Rotation(self.dim, "hadamard", self.seed)

    def coding(self, device: torch.device) -> Coding:
        """The tables and numbers that kernels code with."""
        rotation, book = self.rotation, centroids(self.dim, self.bits, device)
        return Coding(rotation.turns(device), rotation.factor(device), book, self.bits, self.dim)

    def tables(self, device: torch.device) -> list[Tensor]:
        """Every tensor that coding needs beside the pages."""
        coding = self.coding(device)
        return [coding.turns, coding.factor, coding.centroids]

    def side(
        self,
        slab: Slab,
        x: Float[Tensor, "batch kv_heads tokens dim"],
        mean: Float32[Tensor, "batch kv_heads dim"] | None = None,
        channel_scale: Float32[Tensor, "batch kv_heads dim"] | None = None,
        coding: Coding | None = None,
    ) -> Side:
        """Whole pages of vectors, mapped by ``(x - mean)·channel_scale``, on their way to `slab`.

        Args:
            slab: Where the pages will be.
            x: The vectors.
            mean: Of the map.
            channel_scale: Of the map.
            coding: What `coding` returns, where that cannot be traced.
        """
        coding = coding or self.coding(x.device)
        scale: Scale = "unbiased" if self.layout == "key" else "optimal"
        tables = coding.turns, coding.factor, coding.centroids
        pages, scales = self._storage(slab)
        return Side(x, mean, channel_scale, *tables, self.bits, scale, self.layout, pages, scales)

    def read(
        self,
        run: Run,
        dtype: torch.dtype,
        mean: Float32[Tensor, "batch kv_heads dim"] | None = None,
        channel_scale: Float32[Tensor, "batch kv_heads dim"] | None = None,
    ) -> Float[Tensor, "batch kv_heads tokens dim"]:
        """Decode the valid tokens of `run` and undo the map."""
        pages, scales = self._storage(run.slab)
        turns, factor, codebook = self.tables(run.slots.device)
        dense = decode_pages(
            pages,
            scales,
            run.slots,
            mean,
            channel_scale,
            turns,
            factor,
            codebook,
            dim=self.dim,
            bits=self.bits,
            layout=self.layout,
            dtype=dtype,
        )
        return dense if dense.shape[2] == run.tokens else dense[:, :, _valid(run.lengths)]

    def _storage(self, slab: Slab) -> tuple[Tensor, Tensor]:
        if self.layout == "key":
            return slab.key_codes, slab.key_scales
        return slab.value_codes, slab.value_scales


def coders(policy: CachePolicy, key_dim: int, value_dim: int) -> tuple[Coder, Coder]:
    """How `policy` codes keys, and values."""
    return (
        Coder("key", key_dim, policy.key_bits, policy.seed),
        Coder("value", value_dim, policy.value_bits, policy.seed),
    )


def _valid(lengths: Int64[Tensor, " pages"]) -> Int64[Tensor, " tokens"]:
    offsets = torch.arange(PAGE_TOKENS, device=lengths.device)
    return (offsets < lengths[:, None]).flatten().nonzero().flatten()
