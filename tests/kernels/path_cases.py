"""Pages of paths that a backend is to write or read as the reference does."""

from functools import lru_cache

import torch
from torch import Tensor

from sixfold.kernels.encode import reference as encode_reference
from sixfold.kernels.types import Coding, KeyMap, Scale
from sixfold.packing import PAGE_TOKENS, Bits, Layout, row_bytes
from sixfold.rotation import Rotation, RotationKind
from sixfold.trellis import PAGE_BITS, PAGE_STATES, codewords
from tests.kernels.vector_cases import CPU, DTYPES, SLOTS, maps_of, paged_vectors

SHAPES = [
    (dim, bits)
    for dim in (8, 20, 24, 32, 40, 64, 72, 80, 96, 112, 128, 192, 256, 576)
    for bits in PAGE_BITS
    if dim * bits % 8 == 0
]
Case = tuple[Tensor, Coding, KeyMap | None]


def coding_of(
    dim: int, bits: Bits, scale: Scale = "optimal", kind: RotationKind = "hadamard"
) -> Coding:
    rotation = Rotation(dim, kind, seed=1)
    tables = rotation.turns(CPU), rotation.factor(CPU), codewords(PAGE_STATES, bits)
    return Coding(*tables, bits, dim, scale, "trellis")


def pages_of(coding: Coding, fill: int = 7) -> tuple[Tensor, Tensor]:
    size = PAGE_TOKENS * row_bytes(*coding.row)
    return (
        torch.full((5, 2, size), fill, dtype=torch.uint8),
        torch.full((5, 2, PAGE_TOKENS), fill, dtype=torch.float16),
    )


def case_of(dim: int, bits: Bits, layout: Layout) -> Case:
    """Keys have a map, values none; dtypes take turns."""
    x = paged_vectors(dim, DTYPES[dim // 4 % 3])
    return x, coding_of(dim, bits), KeyMap(*maps_of(dim)) if layout == "key" else None


@lru_cache
def expected_pages(dim: int, bits: Bits, layout: Layout) -> tuple[Tensor, Tensor]:
    """Once for all that is compared with it: the reference takes longer."""
    x, coding, key_map = case_of(dim, bits, layout)
    pages = pages_of(coding)
    encode_reference.encode_pages(x, SLOTS, coding, layout, *pages, key_map)
    return pages
