"""What launches of the vector kernels have in common."""

import math
from typing import Any

import torch
import triton
from torch import Tensor

from sixfold.errors import ShapeError
from sixfold.kernels._groups import page_sizes, rotation_blocks
from sixfold.kernels.types import CodeName
from sixfold.packing import PAGE_TOKENS, Bits

# Codes have the same bits everywhere: no product is fused into a sum.
EXACT: dict[str, Any] = {"enable_fp_fusion": False}

# 16 coordinates a thread, 32 of large vectors: they stay in registers.
_TILE_ELEMENTS = 2048
_INTERPRETED_ELEMENTS = 1 << 16
# Longer vectors that are padded change their order through more registers than a thread has.
_PADDED_COLUMNS = 512


def interpreted() -> bool:
    """Whether kernels run as Python on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def rotation(dim: int, turns: Tensor, factor: Tensor) -> dict[str, int]:
    """The constants of `rotate.unnormalized`.

    Raises:
        ShapeError: The tensors are no rotation of `dim` coordinates.
    """
    rounds, order, blocks = rotation_blocks(dim, turns, factor)
    if rounds and tuple(turns.shape) != (rounds, 2, dim // 2):
        raise ShapeError(f"turns: expected [rounds, 2, {dim // 2}], got {list(turns.shape)}")
    inner = order // 2 if rounds and blocks == 1 else order
    # One column too many where there would be no zero to pad with (`in_order`).
    width = triton.next_power_of_2(max(inner, 2 if rounds == 0 else 1))
    size = width * (2 if rounds and blocks == 1 else blocks)
    return {
        "DIM": dim,
        "ROUNDS": rounds,
        "ORDER": order,
        "SIZE": size,
        "INNER": inner,
        "WIDTH": width,
        "BLOCK": size if blocks == 1 else width,
    }


def codebook(
    dim: int, bits: Bits, centroids: Tensor, code: CodeName = "codebook"
) -> dict[str, int]:
    """The constants of `quantize`, `pack` and `unpack`.

    Raises:
        ShapeError: `centroids` is no codebook of `bits`, or pages hold no such trellis.
    """
    symbol, paired, _, shape = page_sizes(dim, bits, code)
    if centroids.shape != shape:
        raise ShapeError(f"centroids: expected {list(shape)}, got {list(centroids.shape)}")
    return {"SYMBOL": symbol, "PAIRED": paired}


def encodes(x: Tensor, rotation: dict[str, int]) -> bool:
    """Whether a kernel encodes it; otherwise plain PyTorch does, on the same device.

    float64 is normalised in float64.
    """
    padded = rotation["SIZE"] != rotation["DIM"]
    return x.dtype is not torch.float64 and not (padded and rotation["SIZE"] > _PADDED_COLUMNS)


def stretch(rotation: dict[str, int]) -> float:
    """What makes coordinates of a unit vector, rotated without its last product, of variance 1."""
    return math.pow(rotation["DIM"], (1 - rotation["ROUNDS"]) / 2)


def shrink(rotation: dict[str, int]) -> float:
    """The last product of a rotation."""
    return math.pow(rotation["DIM"], -rotation["ROUNDS"] / 2)


def check_vectors(x: Tensor, scales: Tensor, slots: Tensor) -> None:
    """Refuse vectors that are not whole pages for `slots`.

    Raises:
        ShapeError: They are not.
    """
    heads = scales.shape[1]
    expected = (slots.shape[0], heads, slots.shape[1] * PAGE_TOKENS)
    if x.shape[:3] != expected:
        raise ShapeError(
            f"x: expected [{expected[0]}, {expected[1]}, {expected[2]}, dim], whole pages for "
            f"slots {list(slots.shape)} of {heads} heads, got {list(x.shape)}"
        )


def check_pages(pages: Tensor, scales: Tensor, dim: int, bits: Bits, code: CodeName) -> None:
    """Refuse pages of other bits or dimensions.

    Raises:
        ShapeError: The tensors do not fit each other or the code.
    """
    shape = (*scales.shape[:2], page_sizes(dim, bits, code)[2])
    strides = (*pages.stride()[:2], pages.storage_offset())
    aligned = not any(bytes_apart % 4 for bytes_apart in strides)
    if pages.shape != shape or pages.stride(-1) != 1 or scales.stride(-1) != 1 or not aligned:
        raise ShapeError(
            f"codes: expected {list(shape)} and scales, both contiguous in their last axis, pages "
            f"multiples of 4 bytes apart, got {list(pages.shape)}, strides "
            f"{list(pages.stride())} and {list(scales.stride())}"
        )


def tile(constants: dict[str, int], least: int = 1) -> dict[str, int]:
    """Vectors a program takes, at least `least` and at most a page of them, and its warps."""
    # Dense rotations add up in float64. The interpreter pays by the operation, whatever its size.
    elements = _TILE_ELEMENTS if constants["ROUNDS"] else _TILE_ELEMENTS // 2
    elements = _INTERPRETED_ELEMENTS if interpreted() else elements
    vectors = min(64, max(least, elements // constants["SIZE"]))
    return {"N": vectors, "num_warps": 8 if vectors * constants["SIZE"] > 4096 else 4}


def page_grid(
    slots: Tensor, heads: int, rotation: dict[str, int], least: int = 1
) -> tuple[tuple[int, ...], dict[str, int]]:
    """The programs of a kernel for pages, none if there are no pages, and their tile."""
    chosen = tile(rotation, least)
    parts = slots.numel() * (PAGE_TOKENS // chosen["N"])
    return (parts, heads) if parts * heads else (), chosen
