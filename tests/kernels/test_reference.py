"""The reference kernels against the oracle, over awkward shapes."""

import math

import pytest
import torch
from torch import Tensor

from sixfold.codebooks import centroids
from sixfold.kernels import _tiles
from sixfold.kernels.decode import decode, decode_pages, expand_pages
from sixfold.kernels.encode import Scale, encode, encode_pages
from sixfold.kernels.rotate import rotate
from sixfold.kernels.scores import scores
from sixfold.kernels.types import Coding, KeyMap
from sixfold.packing import (
    BITS,
    PAGE_TOKENS,
    Bits,
    Layout,
    decode_scale,
    from_pages,
    n_symbols,
    row_bytes,
    symbol_bits,
)
from sixfold.rotation import Rotation, RotationKind
from tests.kernels import oracle
from tests.vectors import gaussian

CPU = torch.device("cpu")
DIMS = [1, 2, 7, 60, 64, 80, 128]
SCALES: list[Scale] = ["norm", "optimal", "unbiased"]


def tables(dim: int, bits: Bits, kind: RotationKind = "hadamard") -> tuple[Tensor, Tensor, Tensor]:
    rotation = Rotation(dim, kind, seed=1)
    return rotation.turns(CPU), rotation.factor(CPU), centroids(dim, bits)


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
@pytest.mark.parametrize("dim", [*DIMS, 96, 384])
@pytest.mark.parametrize("shape", [(), (1,), (63,), (2, 0, 3), (5, 7)])
def test_rotate_is_the_matrix(shape: tuple[int, ...], dim: int, kind: RotationKind) -> None:
    turns, factor, _ = tables(dim, 1, kind)
    matrix = oracle.rotation_matrix(turns, factor)
    x = torch.randn(*shape, dim, generator=torch.Generator().manual_seed(2))
    exact = x.double() @ matrix.mT
    # Rounding of one float32 operation per butterfly level, on vectors of norm sqrt(dim).
    tolerance = 2**-23 * (2 + math.log2(dim)) * 3
    torch.testing.assert_close(rotate(x, turns, factor).double(), exact, rtol=0, atol=tolerance)
    back = rotate(exact.float(), turns, factor, inverse=True)
    torch.testing.assert_close(back, x, rtol=0, atol=tolerance)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", DIMS)
def test_encode_finds_the_nearest_codeword_and_its_scale(
    dim: int, bits: Bits, scale: Scale
) -> None:
    turns, factor, book = tables(dim, bits)
    x = gaussian(63, dim, seed=dim)
    rows, stored = encode(x, turns, factor, book, bits=bits, scale=scale)
    assert rows.shape == (63, row_bytes(n_symbols(dim, bits), symbol_bits(bits)))
    norm = x.double().norm(dim=-1)
    u = (x.double() / norm[:, None]) @ oracle.rotation_matrix(turns, factor).mT * math.sqrt(dim)
    q = oracle.codewords(rows, book, dim, bits)
    distance = (u - q).square().sum(-1)
    if bits in (2.5, 3.5) and dim % 2:
        distance = distance + unpaired_padding(rows, book, dim, bits)
    best = oracle.nearest_distance(u, book, bits)
    assert (distance <= best + 1e-4 * math.sqrt(dim)).all()
    expected = norm / math.sqrt(dim) * oracle.scale(u, q, scale)
    torch.testing.assert_close(decode_scale(stored).double(), expected, rtol=2**-11 + 1e-6, atol=0)


def unpaired_padding(rows: Tensor, book: Tensor, dim: int, bits: Bits) -> Tensor:
    """What the padding coordinate of the last pair adds to the distance."""
    return oracle.codewords(rows, book, dim + 1, bits)[:, -1].square()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", DIMS)
def test_decode_rotates_scaled_codewords_back(dim: int, bits: Bits) -> None:
    turns, factor, book = tables(dim, bits)
    rows, stored = encode(
        gaussian(500, dim, seed=3), turns, factor, book, bits=bits, scale="optimal"
    )
    q = oracle.codewords(rows, book, dim, bits) * decode_scale(stored).double()[:, None]
    exact = q @ oracle.rotation_matrix(turns, factor)
    decoded = decode(rows, stored, turns, factor, book, dim=dim, bits=bits)
    torch.testing.assert_close(decoded.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("dim", "n", "n_queries"), [(1, 1, 1), (7, 63, 2), (80, 500, 0), (64, 0, 3)]
)
def test_scores_are_inner_products_with_codewords(
    dim: int, n: int, n_queries: int, bits: Bits
) -> None:
    turns, factor, book = tables(dim, bits)
    x = gaussian(2 * n, dim, seed=4).view(2, n, dim)
    rows, stored = encode(x, turns, factor, book, bits=bits, scale="unbiased")
    queries = gaussian(2 * n_queries, dim, seed=5).view(2, n_queries, dim)
    estimates = scores(rotate(queries, turns, factor), rows, stored, book, bits=bits)
    decoded = decode(rows, stored, turns, factor, book, dim=dim, bits=bits)
    torch.testing.assert_close(estimates, queries @ decoded.mT, rtol=0, atol=3e-5)


SLOTS = torch.tensor([[5, 2], [0, 8]])
UNTOUCHED = [1, 3, 4, 6, 7]


def encoded_pages(
    x: Tensor, key_map: KeyMap | None, bits: Bits, layout: Layout
) -> tuple[Tensor, Tensor]:
    """Pages and scales [9, heads, ...] with the two sequences of `x` at `SLOTS`."""
    heads, dim = x.shape[1], x.shape[-1]
    size = PAGE_TOKENS * row_bytes(n_symbols(dim, bits), symbol_bits(bits))
    pages = torch.full((9, heads, size), 7, dtype=torch.uint8)
    stored = torch.full((9, heads, PAGE_TOKENS), 7, dtype=torch.float16)
    coding = Coding(*tables(dim, bits), bits, dim, "optimal")
    encode_pages(x, SLOTS, coding, layout, pages, stored, key_map)
    return pages, stored


def affine_map(dim: int) -> KeyMap:
    scale = gaussian(6, dim, seed=8).view(2, 3, dim).exp()
    return KeyMap(gaussian(6, dim, seed=7).view(2, 3, dim), scale)


@pytest.mark.parametrize("layout", ["key", "value"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [7, 60, 64])
def test_pages_hold_the_codes_of_their_vectors(dim: int, bits: Bits, layout: Layout) -> None:
    turns, factor, book = tables(dim, bits)
    x = gaussian(2 * 3 * 128, dim, seed=6).view(2, 3, 128, dim)
    pages, stored = encoded_pages(x, None, bits, layout)
    rows, expected = encode(x, turns, factor, book, bits=bits, scale="optimal")
    assert torch.equal(stored[SLOTS].transpose(1, 2).flatten(2), expected)
    symbols = n_symbols(dim, bits), symbol_bits(bits)
    in_order = from_pages(pages[SLOTS], *symbols, layout).transpose(1, 2).flatten(2, 3)
    assert torch.equal(in_order, rows)
    assert (pages[UNTOUCHED] == 7).all()
    assert (stored[UNTOUCHED] == 7).all()

    plain = decode(rows, expected, turns, factor, book, dim=dim, bits=bits)
    coding = Coding(turns, factor, book, bits, dim, "optimal")
    expanded = expand_pages(pages[SLOTS], stored[SLOTS], coding, layout)
    rotated_back = rotate(expanded, turns, factor, inverse=True)
    assert torch.equal(rotated_back.transpose(1, 2).flatten(2, 3), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2.5, 4])
def test_decoded_pages_undo_the_affine_map(bits: Bits, dtype: torch.dtype) -> None:
    key_map = affine_map(60)
    x = gaussian(2 * 3 * 128, 60, seed=6).view(2, 3, 128, 60).to(dtype)
    mapped = (x.float() - key_map.mean[:, :, None]) * key_map.scale[:, :, None]
    rows, stored = encode(mapped, *tables(60, bits), bits=bits, scale="optimal")
    plain = decode(rows, stored, *tables(60, bits), dim=60, bits=bits)
    decoded = decode_pages(
        *encoded_pages(x, key_map, bits, "key"),
        SLOTS,
        Coding(*tables(60, bits), bits, 60, "optimal"),
        "key",
        dtype,
        key_map,
    )
    expected = plain / key_map.scale[:, :, None] + key_map.mean[:, :, None]
    assert torch.equal(decoded, expected.to(dtype))


@pytest.mark.parametrize("elements", [1, 64 * 60, 3 * 64 * 60, 2 * 3 * 64 * 60])
def test_results_do_not_depend_on_the_tile(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def everything() -> list[Tensor]:
        x = gaussian(2 * 3 * 128, 60, seed=6).view(2, 3, 128, 60)
        rows, stored = encode(x, *tables(60, 4), bits=4, scale="unbiased")
        decoded = decode(rows, stored, *tables(60, 4), dim=60, bits=4)
        products = scores(x[:, :, :5], rows, stored, tables(60, 4)[2], bits=4)
        pages, page_scales = encoded_pages(x, affine_map(60), 4, "value")
        return [rows, stored, decoded, pages, page_scales, products]

    whole = everything()
    monkeypatch.setattr(_tiles, "TILE_ELEMENTS", elements)
    tiled = everything()
    for one, other in zip(whole[:-1], tiled[:-1], strict=True):
        assert torch.equal(one, other)
    torch.testing.assert_close(whole[-1], tiled[-1])


def test_ties_go_to_the_lower_level() -> None:
    turns, factor, book = torch.ones(0, 2, 1), torch.eye(2), torch.tensor([-1.5, -0.5, 0.5, 1.5])
    # u = sqrt(2)·x/‖x‖: the boundary 0 exactly, and its neighbours in float32.
    x = torch.tensor([[0.0, 1.0], [1e-30, 1.0], [-1e-30, 1.0]])
    rows, _ = encode(x, turns, factor, book, bits=2, scale="norm")
    assert [row & 3 for row in rows[:, 0].tolist()] == [1, 2, 1]
