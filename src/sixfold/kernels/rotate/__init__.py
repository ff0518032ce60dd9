"""Random rotation: sign flips and a Hadamard matrix, or a dense orthogonal matrix."""

from jaxtyping import Float, Float32
from torch import Tensor

from sixfold.kernels._dispatch import implementation


def rotate(
    x: Float[Tensor, "*b dim"],
    signs: Float[Tensor, "rounds dim"],
    factor: Float[Tensor, "m m"],
    inverse: bool = False,
) -> Float32[Tensor, "*b dim"]:
    """Multiply vectors by the orthogonal matrix that `signs` and `factor` stand for.

    With dim = m·2^k, one round flips signs and multiplies by a Kronecker product:
    x -> (H ⊗ factor)(signs · x), where H is the ±1 Walsh-Hadamard matrix of order 2^k; the
    rounds are followed by one multiplication by 2^(-k·rounds/2). A dense rotation is the case
    m = dim.

    Args:
        x: Vectors, any floating dtype; computed in float32.
        signs: ±1, one row per round.
        factor: Orthonormal matrix, m = dim / 2^k; not looked at if m = 1.
        inverse: Multiply by the transpose instead.

    Returns:
        Rotated vectors of the same norms. For m = 1 only additions, subtractions and the final
        multiplication are done, in a fixed order (strides 1, 2, 4, ...): bit-identical on every
        backend.

    Source: arXiv:2504.19874 §3.1, with a Hadamard matrix for the QR factor (see README.md).
    """
    rotated: Tensor = implementation("rotate", x.device).rotate(x, signs, factor, inverse)
    return rotated
