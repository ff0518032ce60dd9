"""Codes to vectors."""

import torch
from jaxtyping import Float, Float16, Float32, Int64, UInt8
from torch import Tensor

from sixfold.kernels._border import plain, readable
from sixfold.kernels._dispatch import implementation
from sixfold.kernels._signature import operation
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
        readable("turns", turns),
        readable("factor", factor),
        readable("centroids", centroids),
    )
    kernel = implementation("decode", rows.device)
    vectors: Tensor = kernel.decode(
        rows, plain(scales), turns, factor, centroids, dim=dim, bits=bits
    )
    return vectors


@operation
def decode_pages(
    pages: UInt8[Tensor, "slots heads page_bytes"],
    scales: Float16[Tensor, "slots heads page_tokens"],
    slots: Int64[Tensor, "batch n_pages"],
    mean: Float[Tensor, "batch heads dim"] | None,
    channel_scale: Float[Tensor, "batch heads dim"] | None,
    turns: Float[Tensor, "rounds 2 half"],
    factor: Float[Tensor, "m m"],
    centroids: Float32[Tensor, " levels *pair"],
    *,
    dim: int,
    bits: Bits,
    layout: Layout,
    dtype: torch.dtype,
) -> Float[Tensor, "batch heads tokens {dim}"]:
    """Inverse of `encode_pages`: the decoded vectors, divided by `channel_scale`, plus `mean`.

    Args:
        pages: As written by `encode_pages`.
        scales: As written by `encode_pages`.
        slots: The pages of each sequence, in order.
        mean: As given to `encode_pages`.
        channel_scale: As given to `encode_pages`.
        turns: See `rotate`.
        factor: See `rotate`.
        centroids: See `encode`.
        dim: Coordinates per vector.
        bits: See `encode`.
        layout: As given to `encode_pages`.
        dtype: Of the result. The only tensor of its size; the work is done in tiles.

    Returns:
        Vectors of n_pages · 64 tokens.
    """
    kernel = implementation("decode", pages.device)
    vectors: Tensor = kernel.decode_pages(
        pages,
        scales,
        slots,
        plain(mean),
        plain(channel_scale),
        turns,
        factor,
        centroids,
        dim=dim,
        bits=bits,
        layout=layout,
        dtype=dtype,
    )
    return vectors


@operation
def expand_pages(
    pages: UInt8[Tensor, "*b page_bytes"],
    scales: Float16[Tensor, "*b page_tokens"],
    centroids: Float32[Tensor, " levels *pair"],
    *,
    dim: int,
    bits: Bits,
    layout: Layout,
) -> Float32[Tensor, "*b page_tokens {dim}"]:
    """Pages as vectors of the rotated domain: scale·codeword, not rotated back."""
    kernel = implementation("decode", pages.device)
    vectors: Tensor = kernel.expand_pages(
        pages, scales, centroids, dim=dim, bits=bits, layout=layout
    )
    return vectors
