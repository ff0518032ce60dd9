"""Random rotation: plane rotations and a Hadamard matrix, or a dense orthogonal matrix."""

from jaxtyping import Float, Float32
from torch import Tensor

from sixfold.kernels._dispatch import implementation
from sixfold.kernels._operation import operation, plain_dense


@operation
def rotate(
    x: Float[Tensor, "*b dim"],
    turns: Float[Tensor, "rounds 2 half"],
    factor: Float[Tensor, "m m"],
    inverse: bool = False,
) -> Float32[Tensor, "*b dim"]:
    """Multiply vectors by the orthogonal matrix that `turns` and `factor` stand for.

    With dim = m·2^k, one round rotates the plane of coordinates i and i + dim/2, for every i below
    dim/2, by an angle of its own, and multiplies by a Hadamard matrix:
    x -> (H ⊗ factor)(G·x), where H is the ±1 Walsh-Hadamard matrix of order 2^k; the rounds are
    followed by one multiplication by dim^(-rounds/2). Without rounds the rotation is dense:
    x -> factor·x.

    Args:
        x: Vectors, any floating dtype; computed in float32.
        turns: Cosines [:, 0] and sines [:, 1] of each round's angles; half = dim/2.
        factor: With rounds a ±1 Hadamard matrix, m = dim / 2^k; without, orthonormal, m = dim.
        inverse: Multiply by the transpose instead.

    Returns:
        Rotated vectors of the same norms. With rounds bit-identical on every backend: no operation
        is fused, and sums have a fixed order (README.md).

    Source: arXiv:2504.19874 §3.1, with Hadamard rounds for the QR factor (see README.md).
    """
    x, turns, factor = (
        plain_dense("x", x),
        plain_dense("turns", turns),
        plain_dense("factor", factor),
    )
    rotated: Tensor = implementation("rotate", x.device).rotate(x, turns, factor, inverse)
    return rotated
