"""Codes to vectors."""

import torch
from jaxtyping import Float, Float16, Float32, Int64, UInt8
from torch import Tensor

from sixfold.kernels._dispatch import implementation
from sixfold.kernels._operation import operation, plain, plain_dense
from sixfold.kernels.types import Coding, KeyMap
from sixfold.packing import Bits, Layout


@operation
def decode(
    rows: UInt8[Tensor, "*b row_bytes"],
    scales: Float16[Tensor, "*b"],
    turns: Float[Tensor, "rounds 2 half"],
    factor: Float[Tensor, "m m"],
    centroids: Float32[Tensor, " levels *pair"],
    *,
    dim: int,
    bits: Bits,
) -> Float32[Tensor, "*b {dim}"]:
    """R⁻¹ of scale·codeword: the inverse of `encode`, up to the distortion of the codebook.

    Source: arXiv:2504.19874 Algorithm 1.
    """
    turns, factor, centroids = (
        plain_dense("turns", turns),
        plain_dense("factor", factor),
        plain_dense("centroids", centroids),
    )
    kernel = implementation("decode", rows.device)
    vectors: Tensor = kernel.decode(
        rows, plain(scales), turns, factor, centroids, dim=dim, bits=bits
    )
    return vectors


@operation
def decode_pages(
    codes: UInt8[Tensor, "slots heads page_bytes"],
    scales: Float16[Tensor, "slots heads page_tokens"],
    slots: Int64[Tensor, "batch n_pages"],
    coding: Coding,
    layout: Layout,
    dtype: torch.dtype,
    key_map: KeyMap | None = None,
) -> Float[Tensor, "batch heads tokens {coding.dim}"]:
    """Inverse of `encode_pages`: the decoded vectors, their map undone.

    Args:
        codes: As written by `encode_pages`.
        scales: As written by `encode_pages`.
        slots: The pages of each sequence, in order.
        coding: As given to `encode_pages`.
        layout: As given to `encode_pages`.
        key_map: As given to `encode_pages`.
        dtype: Of the result. The only tensor of its size; the work is done in tiles.

    Returns:
        Vectors of n_pages · 64 tokens.
    """
    kernel = implementation("decode", codes.device)
    vectors: Tensor = kernel.decode_pages(codes, scales, slots, coding, layout, dtype, key_map)
    return vectors


@operation
def expand_pages(
    codes: UInt8[Tensor, "*b page_bytes"],
    scales: Float16[Tensor, "*b page_tokens"],
    coding: Coding,
    layout: Layout,
) -> Float32[Tensor, "*b page_tokens {coding.dim}"]:
    """Pages as vectors of the rotated domain: scale·codeword, not rotated back."""
    vectors: Tensor = implementation("decode", codes.device).expand_pages(
        codes, scales, coding, layout
    )
    return vectors
