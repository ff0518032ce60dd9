"""Table lookup shared by the references: indices or packed rows to codewords."""

from jaxtyping import Float32, UInt8
from torch import Tensor

from sixfold.packing import Bits, n_symbols, symbol_bits, unpack


def lookup(
    indices: UInt8[Tensor, "*b n"], centroids: Float32[Tensor, " levels *pair"], dim: int
) -> Float32[Tensor, "*b {dim}"]:
    """Codewords as coordinates; the padding of the last pair of an odd `dim` is dropped."""
    chosen = centroids.index_select(0, indices.flatten().int())
    chosen = chosen.view(*indices.shape, *centroids.shape[1:])
    if centroids.ndim == 1:
        return chosen
    return chosen.transpose(-1, -2).flatten(-2)[..., :dim]


def expand(
    rows: UInt8[Tensor, "*b row_bytes"],
    centroids: Float32[Tensor, " levels *pair"],
    *,
    dim: int,
    bits: Bits,
) -> Float32[Tensor, "*b {dim}"]:
    """Codewords of packed rows, before any scale."""
    return lookup(unpack(rows, n_symbols(dim, bits), symbol_bits(bits)), centroids, dim)
