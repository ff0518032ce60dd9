"""What a compressed layer holds, as its kernels take it: plain tuples of tensors and numbers."""

from typing import Any, NamedTuple

from jaxtyping import Float, Float16, Float32, Int64, UInt8
from torch import Tensor

from sixfold.packing import Bits


class Tokens(NamedTuple):
    """Consecutive tokens in full precision.

    Attributes:
        keys: Keys in the model's dtype.
        values: Values.
        first: Position of each sequence's first token.
        start: Tokens at earlier positions are hidden (padding, sinks that are held elsewhere).
        stop: Tokens at this position and later ones are hidden.
    """

    keys: Float[Tensor, "batch kv_heads tokens key_dim"]
    values: Float[Tensor, "batch kv_heads tokens value_dim"]
    first: Int64[Tensor, " batch"]
    start: Int64[Tensor, " batch"]
    stop: Int64[Tensor, " batch"]


class Pages(NamedTuple):
    """Consecutive compressed tokens whose pages lie in one pool.

    Attributes:
        key_pages: Page pool in the key layout (docs/format.md).
        key_scales: Scale of every key, as coded by `packing.encode_scale`.
        value_pages: Page pool in the value layout.
        value_scales: Scale of every value.
        block_table: Slot in the pools of every sequence's pages, in order.
        starts: Each page's first token, counted from the first page's.
        lengths: Valid tokens of each page, 0 to 64.
        first: Position of the first page's first token.
        memo: For backends, to keep what they found out about these tensors: it spares them to look
            at every pool in every step. Entries name the tensors they are about.
    """

    key_pages: UInt8[Tensor, "slots kv_heads key_bytes"]
    key_scales: Float16[Tensor, "slots kv_heads page"]
    value_pages: UInt8[Tensor, "slots kv_heads value_bytes"]
    value_scales: Float16[Tensor, "slots kv_heads page"]
    block_table: Int64[Tensor, "batch pages"]
    starts: Int64[Tensor, " pages"]
    lengths: Int64[Tensor, " pages"]
    first: int
    memo: dict[Any, Any]


class Coding(NamedTuple):
    """How keys, or values, were turned into codes.

    Attributes:
        turns: See `sixfold.kernels.rotate`.
        factor: See `sixfold.kernels.rotate`.
        centroids: See `sixfold.codebooks.centroids`.
        bits: Bits a coordinate.
        dim: Coordinates of a vector.
    """

    turns: Float32[Tensor, "rounds 2 half"]
    factor: Float32[Tensor, "m m"]
    centroids: Float32[Tensor, " levels *pair"]
    bits: Bits
    dim: int
