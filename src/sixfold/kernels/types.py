"""What operations on a cache take: plain tuples that say what of it lies where.

Their tensors belong to whoever serves: a cache that grows, a static one, the blocks of an engine.
Sequences of a batch may differ in length; a rectangular batch is the special case.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Self, TypeAlias

import torch
from jaxtyping import Bool, Float, Float16, Float32, Int64, UInt8
from torch import Tensor

from sixfold.packing import Bits, n_symbols, symbol_bits
from sixfold.trellis import path_bytes

Scale: TypeAlias = Literal["norm", "optimal", "unbiased"]
CodeName: TypeAlias = Literal["codebook", "trellis"]


def row_symbols(dim: int, bits: Bits, code: CodeName) -> tuple[int, int]:
    """Symbols of a row and their bits, as `packing.to_pages` takes them: a path is bytes."""
    if code == "trellis":
        return path_bytes(dim, bits), 8
    return n_symbols(dim, bits), symbol_bits(bits)


class Coding(NamedTuple):
    """How keys, or values, are turned into codes.

    Attributes:
        turns: See `sixfold.kernels.rotate`.
        factor: See `sixfold.kernels.rotate`.
        centroids: See `sixfold.codebooks.centroids`; of a trellis see `sixfold.trellis.codewords`.
        bits: Bits a coordinate.
        dim: Coordinates of a vector.
        scale: What is stored in place of the norm, see `sixfold.kernels.encode`.
        code: Whether a symbol stands for its coordinate alone, or coordinates share bits.
    """

    turns: Float[Tensor, "rounds 2 half"]
    factor: Float[Tensor, "m m"]
    centroids: Float32[Tensor, " levels *pair"]
    bits: Bits
    dim: int
    scale: Scale
    code: CodeName = "codebook"

    @property
    def row(self) -> tuple[int, int]:
        """See `row_symbols`."""
        return row_symbols(self.dim, self.bits, self.code)


class KeyMap(NamedTuple):
    """What keys are mapped by before they are coded, ``(k - mean)·scale`` (docs/key_map.md).

    Attributes:
        mean: Mean of every map and KV head.
        scale: Channel scales, positive.
        map_index: Which map each sequence has; None: each its own, in order.
    """

    mean: Float32[Tensor, "maps kv_heads dim"]
    scale: Float32[Tensor, "maps kv_heads dim"]
    map_index: Int64[Tensor, " batch"] | None = None

    def select(self, rows: Tensor) -> "KeyMap":
        """The maps of other sequences of the batch."""
        if self.map_index is not None:
            return self._replace(map_index=self.map_index[rows])
        return KeyMap(self.mean[rows], self.scale[rows])

    def to(self, device: torch.device) -> "KeyMap":
        """The same on another device."""
        index = None if self.map_index is None else self.map_index.to(device)
        return KeyMap(self.mean.to(device), self.scale.to(device), index)

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        return [x for x in self if x is not None]

    def of_sequences(self) -> "KeyMap":
        """The same with a map for every sequence, in order."""
        return self if self.map_index is None else KeyMap(*(x[self.map_index] for x in self[:2]))


class Pool(NamedTuple):
    """Memory for pages of codes. A head's page is contiguous; slots and heads lie where they may.

    Attributes:
        key_codes: Keys in the key layout (docs/format.md).
        key_scales: Scale of every key, as coded by `packing.encode_scale`.
        value_codes: Values in the value layout.
        value_scales: Scale of every value.
    """

    key_codes: UInt8[Tensor, "slots kv_heads key_bytes"]
    key_scales: Float16[Tensor, "slots kv_heads page"]
    value_codes: UInt8[Tensor, "slots kv_heads value_bytes"]
    value_scales: Float16[Tensor, "slots kv_heads page"]


class VectorPart(NamedTuple):
    """Coordinates of vectors that are coded together: all of them, or a group.

    Attributes:
        codes: In the key layout (docs/format.md).
        scales: Scale of every vector, as coded by `packing.encode_scale`.
        coding: How they were coded.
    """

    codes: UInt8[Tensor, "pages page_bytes"]
    scales: Float16[Tensor, "pages page"]
    coding: Coding


class VectorPages(NamedTuple):
    """Vectors of an index, 64 a page.

    Attributes:
        parts: Their coordinates, in order; 1 to 8 parts.
        offsets: What each adds to its scores, by a query's weight; None: nothing.
        allowed: Bit i of byte j says whether vector 8j + i of the page counts. Others may hold
            anything.
    """

    parts: Sequence[VectorPart]
    offsets: Float[Tensor, "pages page"] | None
    allowed: UInt8[Tensor, "pages bitmap"]


class Pages(NamedTuple):
    """Compressed tokens whose pages lie in one pool.

    Attributes:
        pool: Where the pages are.
        slots: The page table: the slot in the pool of every sequence's pages, in order.
        starts: Each page's first token, counted from `first`: they do not fall, and a page begins
            at most 64 tokens after the one before.
        lengths: Valid tokens of each page, 0 to 64. A sequence that has fewer pages than others
            has pages of 0 tokens, whose slots need only exist.
        first: Position that `starts` count from.
    """

    pool: Pool
    slots: Int64[Tensor, "batch pages"]
    starts: Int64[Tensor, "#batch pages"]
    lengths: Int64[Tensor, "#batch pages"]
    first: int


class Tokens(NamedTuple):
    """Consecutive tokens in full precision. Vectors are contiguous; the rest lies where it may.

    Attributes:
        keys: Keys in the model's dtype.
        values: Values.
        first: Position of each sequence's first token.
        start: Tokens at earlier positions are hidden (padding, sinks that are held elsewhere).
        stop: Tokens at this position and later ones are hidden; None: none of them.
        slots: Which row of `keys` and `values` each sequence has; None: each its own, in order.
    """

    keys: Float[Tensor, "rows kv_heads tokens key_dim"]
    values: Float[Tensor, "rows kv_heads tokens value_dim"]
    first: Int64[Tensor, " batch"]
    start: Int64[Tensor, " batch"]
    stop: Int64[Tensor, " batch"] | None = None
    slots: Int64[Tensor, " batch"] | None = None


class Past(NamedTuple):
    """What is held of earlier tokens, the same from step to step until a page is written.

    Attributes:
        pages: Compressed parts.
        key_map: Of their keys (docs/key_map.md).
        start: Tokens of `pages` at earlier positions are hidden.
        kept: Parts in full precision beside them: sinks.
        memo: For backends, to keep what they found out about these tensors: it spares them to look
            at every one in every step. Never their numbers, which others may change.
    """

    pages: Sequence[Pages]
    key_map: KeyMap
    start: Int64[Tensor, " batch"]
    kept: Sequence[Tokens]
    memo: dict[Any, Any]

    @classmethod
    def of(
        cls,
        pages: Sequence[Pages],
        key_map: KeyMap,
        start: Int64[Tensor, " batch"],
        kept: Sequence[Tokens] = (),
    ) -> Self:
        """Of these, of which nothing is known yet."""
        return cls(pages, key_map, start, kept, {})


Mask: TypeAlias = (
    Bool[Tensor, "#batch #heads queries kv"] | Float[Tensor, "#batch #heads queries kv"]
)


class Softmax(NamedTuple):
    """What makes weights of logits.

    Attributes:
        scaling: Factor of the logits.
        mask: Attended tokens; columns are positions. Causal without.
        sliding_window: Without a mask, only the last so many positions are attended.
        softcap: Logits become ``softcap·tanh(logit/softcap)``.
        sink_logits: A learned logit a head without a value (GPT-OSS).
    """

    scaling: float
    mask: Mask | None = None
    sliding_window: int | None = None
    softcap: float | None = None
    sink_logits: Float[Tensor, " heads"] | None = None
