"""Vectors to codes: normalise, rotate, quantize each coordinate, pack."""

from typing import get_args

from jaxtyping import Float, Float16, Float32, Int64, UInt8
from torch import Tensor

from sixfold.arguments import choice
from sixfold.errors import ShapeError
from sixfold.kernels._dispatch import implementation
from sixfold.kernels._operation import operation, plain, plain_dense
from sixfold.kernels.types import Coding, KeyMap, Pool, Scale
from sixfold.packing import PAGE_TOKENS, Bits, Layout

__all__ = ["Scale", "encode", "encode_pages", "store_pages"]


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
        plain_dense("turns", turns),
        plain_dense("factor", factor),
        plain_dense("centroids", centroids),
    )
    scale = choice("scale", scale, get_args(Scale))
    kernel = implementation("encode", x.device)
    codes: tuple[Tensor, Tensor] = kernel.encode(
        plain_dense("x", x), turns, factor, centroids, bits=bits, scale=scale
    )
    return codes


@operation
def encode_pages(
    x: Float[Tensor, "batch heads tokens dim"],
    slots: Int64[Tensor, "batch n_pages"],
    coding: Coding,
    layout: Layout,
    codes: UInt8[Tensor, "slots heads page_bytes"],
    scales: Float16[Tensor, "slots heads page_tokens"],
    key_map: KeyMap | None = None,
) -> None:
    """Encode whole pages of vectors, mapped if there is a map, and write them where `slots` says.

    Works in tiles: nothing of the size of `x` is allocated.

    Args:
        x: Vectors; tokens = n_pages · 64.
        slots: Distinct page numbers.
        coding: How.
        layout: Order of bytes within a page (see `sixfold.packing.to_pages`).
        codes: Written in place; a head's page is contiguous.
        scales: Written in place, likewise.
        key_map: Applied before.
    """
    implementation("encode", x.device).encode_pages(
        plain_dense("x", x), slots, coding, layout, codes, scales, key_map
    )


@operation
def store_pages(
    keys: Float[Tensor, "batch heads tokens key_dim"],
    values: Float[Tensor, "batch heads tokens value_dim"],
    slots: Int64[Tensor, "batch n_pages"],
    pool: Pool,
    key_coding: Coding,
    value_coding: Coding,
    key_map: KeyMap | None = None,
) -> None:
    """`encode_pages` of keys (layout `"key"`) and of values, at once where a backend can.

    Args:
        keys: Keys of whole pages.
        values: Their values.
        slots: Distinct page numbers, the same for both.
        pool: Written in place.
        key_coding: How keys are coded.
        value_coding: How values are coded.
        key_map: Applied to keys before.
    """
    expected = (len(slots), pool.key_codes.shape[1], slots.shape[1] * PAGE_TOKENS)
    shared = {x.shape[:2] for x in pool}
    if (
        keys.shape != (*expected, key_coding.dim)
        or values.shape != (*expected, value_coding.dim)
        or len(shared) > 1
    ):
        # Before any of them is written.
        raise ShapeError(
            f"expected keys {[*expected, key_coding.dim]} and values "
            f"{[*expected, value_coding.dim]}, and pools of as many slots and heads each, got "
            f"{list(keys.shape)}, {list(values.shape)} and {[list(x.shape) for x in pool]}."
        )
    implementation("encode", slots.device).store_pages(
        plain(keys), plain(values), slots, pool, key_coding, value_coding, key_map
    )
