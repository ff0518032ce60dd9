"""Trellis-coded quantization: vectors to paths of windows, and back (README.md)."""

from typing import get_args

from jaxtyping import Float, Float16, Float32, UInt8
from torch import Tensor

from sixfold.arguments import choice
from sixfold.kernels._dispatch import implementation
from sixfold.kernels._operation import operation, plain_dense
from sixfold.kernels.types import Scale
from sixfold.packing import Bits


@operation
def encode(
    x: Float[Tensor, "*b dim"],
    turns: Float[Tensor, "rounds 2 half"],
    factor: Float[Tensor, "m m"],
    codewords: Float32[Tensor, " states"],
    *,
    bits: Bits,
    scale: Scale,
) -> tuple[UInt8[Tensor, "*b path_bytes"], Float16[Tensor, "*b"]]:
    """Find the path through the trellis whose codewords are nearest to the rotated vector.

    Args:
        x: Vectors, any floating dtype; computed in float32.
        turns: See `rotate`.
        factor: See `rotate`.
        codewords: See `sixfold.trellis.codewords`.
        bits: Width in bits per coordinate.
        scale: See `sixfold.kernels.encode.encode`, q being the codewords of the path.

    Returns:
        Packed paths (see `sixfold.trellis.pack_path`) and scales. A zero vector has scale 0, a
        vector with NaN or infinity scale NaN; neither affects another vector.

    Source: Tseng et al. 2024, QTIP (arXiv:2406.11235), Algorithm 4.
    """
    x, turns, factor, codewords = (
        plain_dense("x", x),
        plain_dense("turns", turns),
        plain_dense("factor", factor),
        plain_dense("codewords", codewords),
    )
    scale = choice("scale", scale, get_args(Scale))
    kernel = implementation("trellis", x.device)
    codes: tuple[Tensor, Tensor] = kernel.encode(
        x, turns, factor, codewords, bits=bits, scale=scale
    )
    return codes


@operation
def decode(
    rows: UInt8[Tensor, "*b path_bytes"],
    scales: Float16[Tensor, "*b"],
    turns: Float[Tensor, "rounds 2 half"],
    factor: Float[Tensor, "m m"],
    codewords: Float32[Tensor, " states"],
    *,
    dim: int,
    bits: Bits,
) -> Float32[Tensor, "*b {dim}"]:
    """R⁻¹ of scale·codewords: the inverse of `encode`, up to its distortion."""
    kernel = implementation("trellis", rows.device)
    turns, factor, codewords = (
        plain_dense("turns", turns),
        plain_dense("factor", factor),
        plain_dense("codewords", codewords),
    )
    vectors: Tensor = kernel.decode(rows, scales, turns, factor, codewords, dim=dim, bits=bits)
    return vectors


@operation
def scores(
    queries: Float32[Tensor, "*b nq dim"],
    rows: UInt8[Tensor, "*b n path_bytes"],
    scales: Float16[Tensor, "*b n"],
    codewords: Float32[Tensor, " states"],
    *,
    bits: Bits,
) -> Float32[Tensor, "*b nq n"]:
    """scale·⟨R·query, codewords⟩, without decoding more than a tile.

    Args:
        queries: Already rotated (`rotate` with the turns and factor of the codes).
        rows: Packed paths.
        scales: Their scales.
        codewords: See `encode`.
        bits: Width in bits per coordinate.
    """
    kernel = implementation("trellis", rows.device)
    queries, codewords = plain_dense("queries", queries), plain_dense("codewords", codewords)
    products: Tensor = kernel.scores(queries, rows, scales, codewords, bits=bits)
    return products
