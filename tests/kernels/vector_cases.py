"""Cases that compare a backend of rotate, encode, decode and scores with the references."""

import torch
from torch import Tensor

from sixfold.codebooks import centroids
from sixfold.kernels.decode import reference as decode_reference
from sixfold.kernels.types import Coding, Scale
from sixfold.packing import PAGE_TOKENS, Bits, n_symbols, row_bytes, symbol_bits
from sixfold.rotation import Rotation, RotationKind
from tests.vectors import gaussian, generator, one_hot, spiky

CPU = torch.device("cpu")
# Powers of two, orders 12, 20, 36 and 100 with and without butterflies, and dense ones.
DIMS = [1, 2, 4, 20, 33, 64, 80, 92, 96, 128, 200, 256, 576]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALES: list[Scale] = ["norm", "optimal", "unbiased"]


def tables(dim: int, bits: Bits, kind: RotationKind = "hadamard") -> tuple[Tensor, Tensor, Tensor]:
    rotation = Rotation(dim, kind, seed=1)
    return rotation.turns(CPU), rotation.factor(CPU), centroids(dim, bits)


def coding_of(dim: int, bits: Bits, scale: Scale = "optimal") -> Coding:
    return Coding(*tables(dim, bits), bits, dim, scale)


def assert_same_bits(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    integers = {2: torch.int16, 4: torch.int32}
    if expected.is_floating_point():
        got, expected = (x.contiguous().view(integers[x.element_size()]) for x in (got, expected))
    differing = (got != expected).nonzero()
    assert differing.numel() == 0, f"{len(differing)} differ, first at {differing[0].tolist()}"


def assert_same_codes(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert_same_bits(got[0], expected[0])
    # A zero vector's scale is plus zero by docs/format.md.
    assert_same_bits(got[1], torch.where(expected[1] == 0, 0, expected[1]))


def mixed(n: int, dim: int, seed: int) -> Tensor:
    """Vectors of every kind and magnitude that float16 has, among them all that are special."""
    x = torch.cat((gaussian(n, dim, seed), spiky(n, dim, seed) if dim > 6 else gaussian(n, dim, 3)))
    x = x * torch.exp2(torch.randint(-14, 10, (len(x), 1), generator=generator(seed)))
    special = one_hot(6, dim, seed)
    special[1] *= 0
    special[2] *= torch.nan
    special[3] *= torch.inf
    special[4] *= 3e-8
    special[5] = 1
    return torch.cat((x, special))


def pages_of(dim: int, bits: Bits, heads: int = 2, slots: int = 5) -> tuple[Tensor, Tensor]:
    size = PAGE_TOKENS * row_bytes(n_symbols(dim, bits), symbol_bits(bits))
    return (
        torch.full((slots, heads, size), 7, dtype=torch.uint8),
        torch.full((slots, heads, PAGE_TOKENS), 7, dtype=torch.float16),
    )


def paged_vectors(dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[2, 2, 2 pages, dim], strided as models store it: tokens before heads."""
    x = mixed(125, dim, seed=dim)[:256]
    x = torch.cat((x, gaussian(512 - len(x), dim, seed=9)))
    return x.view(2, 2 * PAGE_TOKENS, 2, dim).transpose(1, 2).to(dtype)


def maps_of(dim: int) -> tuple[Tensor, Tensor]:
    return gaussian(4, dim, seed=7).view(2, 2, dim), gaussian(4, dim, seed=8).view(2, 2, dim).exp()


SLOTS = torch.tensor([[3, 0], [4, 1]])


def expanded(rows: Tensor, book: Tensor, dim: int, bits: Bits) -> Tensor:
    ones = torch.ones(rows.shape[:-1], dtype=torch.float16)
    turns, factor = torch.zeros(0, 2, dim // 2), torch.eye(dim)
    return decode_reference.decode(rows, ones, turns, factor, book, dim=dim, bits=bits)
