"""Vectors to codes: normalise, rotate, quantize each coordinate, pack."""

from typing import Literal, NamedTuple, TypeAlias, get_args

from jaxtyping import Float, Float16, Float32, Int64, UInt8
from torch import Tensor

from sixfold.arguments import choice
from sixfold.kernels._border import plain, readable
from sixfold.kernels._dispatch import implementation
from sixfold.kernels._signature import operation
from sixfold.packing import Bits, Layout

Scale: TypeAlias = Literal["norm", "optimal", "unbiased"]


class Side(NamedTuple):
    """Keys, or values, and the pages they go to: what `encode_pages` takes, but for the slots."""

    x: Float[Tensor, "batch heads tokens dim"]
    mean: Float[Tensor, "batch heads dim"] | None
    channel_scale: Float[Tensor, "batch heads dim"] | None
    turns: Float[Tensor, "rounds 2 half"]
    factor: Float[Tensor, "m m"]
    centroids: Float32[Tensor, " levels *pair"]
    bits: Bits
    scale: Scale
    layout: Layout
    pages: UInt8[Tensor, "slots heads page_bytes"]
    scales: Float16[Tensor, "slots heads page_tokens"]


@operation
def encode(
    x: Float[Tensor, "*b dim"],
    turns: Float[Tensor, "rounds 2 half"],
    factor: Float[Tensor, "m m"],
    centroids: Float32[Tensor, " levels *pair"],
    *,
    bits: Bits,
    scale: Scale,
) -> tuple[UInt8[Tensor, "*b row_bytes"], Float16[Tensor, "*b"]]:
    """Quantize vectors coordinate by coordinate in the rotated domain.

    With u = sqrt(dim)·R·x/‖x‖ (unit variance) and q the codewords of u, the decoded vector is
    R⁻¹ of `scale`·q. Index = number of boundaries strictly below u, the boundaries being the
    float32 midpoints of neighbouring centroids; for pairs, the first of the nearest points.

    Args:
        x: Vectors, any floating dtype; computed in float32.
        turns: See `rotate`.
        factor: See `rotate`.
        centroids: See `sixfold.codebooks.centroids`.
        bits: Width in bits per coordinate.
        scale: What is stored in place of the norm, in units of ‖x‖/sqrt(dim). `"norm"`: 1, as
            in the paper. `"optimal"`: ⟨u,q⟩/⟨q,q⟩, the least squared error. `"unbiased"`:
            dim/⟨u,q⟩, for which E⟨y, x̂⟩ = ⟨y, x⟩ over rotations.

    Returns:
        Packed codes and scales (see `sixfold.packing`). A zero vector has scale 0, a vector
        with NaN or infinity scale NaN; neither affects another vector.

    Source: arXiv:2504.19874 Algorithm 1; scales from DRIVE/EDEN (arXiv:2108.08842).
    """
    turns, factor, centroids = (
        readable("turns", turns),
        readable("factor", factor),
        readable("centroids", centroids),
    )
    scale = choice("scale", scale, get_args(Scale))
    kernel = implementation("encode", x.device)
    codes: tuple[Tensor, Tensor] = kernel.encode(
        readable("x", x), turns, factor, centroids, bits=bits, scale=scale
    )
    return codes


@operation
def encode_pages(
    x: Float[Tensor, "batch heads tokens dim"],
    mean: Float[Tensor, "batch heads dim"] | None,
    channel_scale: Float[Tensor, "batch heads dim"] | None,
    turns: Float[Tensor, "rounds 2 half"],
    factor: Float[Tensor, "m m"],
    centroids: Float32[Tensor, " levels *pair"],
    *,
    bits: Bits,
    scale: Scale,
    layout: Layout,
    pages: UInt8[Tensor, "slots heads page_bytes"],
    scales: Float16[Tensor, "slots heads page_tokens"],
    slots: Int64[Tensor, "batch n_pages"],
) -> None:
    """Encode whole pages of (x - mean)·channel_scale and write them where `slots` says.

    Works in tiles: nothing of the size of `x` is allocated.

    Args:
        x: Vectors; tokens = n_pages · 64.
        mean: Subtracted per channel, if given.
        channel_scale: Multiplied per channel after that, if given.
        turns: See `rotate`.
        factor: See `rotate`.
        centroids: See `encode`.
        bits: See `encode`.
        scale: See `encode`.
        layout: Order of bytes within a page (see `sixfold.packing.to_pages`).
        pages: Written in place.
        scales: Written in place.
        slots: Distinct page numbers.
    """
    implementation("encode", x.device).encode_pages(
        readable("x", x),
        plain(mean),
        plain(channel_scale),
        turns,
        factor,
        centroids,
        bits=bits,
        scale=scale,
        layout=layout,
        pages=pages,
        scales=scales,
        slots=slots,
    )


@operation
def store_pages(keys: Side, values: Side, slots: Int64[Tensor, "batch n_pages"]) -> None:
    """`encode_pages` of keys (layout `"key"`) and of values, at once where a backend can.

    Args:
        keys: Vectors of whole pages and where they go.
        values: As many.
        slots: Distinct page numbers, the same for both.
    """
    keys, values = (side._replace(x=plain(side.x)) for side in (keys, values))
    implementation("encode", slots.device).store_pages(keys, values, slots)
