"""Scores in plain PyTorch."""

import math

from jaxtyping import Float16, Float32, UInt8
from torch import Tensor

from sixfold.kernels._codewords import expand
from sixfold.kernels._tiles import tiles
from sixfold.packing import Bits, decode_scale


def scores(
    queries: Float32[Tensor, "*b nq dim"],
    rows: UInt8[Tensor, "*b n row_bytes"],
    scales: Float16[Tensor, "*b n"],
    centroids: Float32[Tensor, " levels *pair"],
    *,
    bits: Bits,
) -> Float32[Tensor, "*b nq n"]:
    """See `sixfold.kernels.scores.scores`."""
    *batch, n_queries, dim = queries.shape
    n = rows.shape[-2]
    products = queries.new_empty(*batch, n_queries, n)
    for tile in tiles(n, math.prod(batch) * dim):
        codewords = expand(rows[..., tile, :], centroids, dim=dim, bits=bits)
        # Scales last: a NaN scale must not reach the other columns of the product.
        products[..., tile] = queries @ codewords.mT * decode_scale(scales[..., None, tile])
    return products
