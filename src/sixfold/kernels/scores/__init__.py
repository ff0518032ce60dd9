"""Inner products of queries with codes, without decoding more than a tile."""

from jaxtyping import Float16, Float32, UInt8
from torch import Tensor

from sixfold.kernels._dispatch import implementation
from sixfold.kernels._operation import operation, plain, plain_dense
from sixfold.packing import Bits


@operation
def scores(
    queries: Float32[Tensor, "*b nq dim"],
    rows: UInt8[Tensor, "*b n row_bytes"],
    scales: Float16[Tensor, "*b n"],
    centroids: Float32[Tensor, " levels *pair"],
    *,
    bits: Bits,
) -> Float32[Tensor, "*b nq n"]:
    """scale·⟨R·query, codeword⟩: rotations keep inner products, so codes stay rotated.

    Args:
        queries: Already rotated (`rotate` with the turns and factor of the codes).
        rows: Packed codes.
        scales: Their scales.
        centroids: See `encode`.
        bits: Width in bits per coordinate.

    Returns:
        Estimates of ⟨query, x⟩; NaN only for vectors that were not finite.
    """
    kernel = implementation("scores", rows.device)
    products: Tensor = kernel.scores(
        plain_dense("queries", queries), rows, plain(scales), centroids, bits=bits
    )
    return products
