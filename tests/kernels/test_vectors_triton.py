"""Triton's rotate, encode, decode and scores against the references, bit for bit.

In Triton's interpreter where there is no GPU; on one, the same tests run the compiled kernels.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("sixfold.kernels._triton", exc_type=ImportError)

from sixfold.codebooks import centroids
from sixfold.errors import ShapeError
from sixfold.kernels.decode import reference as decode_reference
from sixfold.kernels.encode import Scale
from sixfold.kernels.encode import reference as encode_reference
from sixfold.kernels.rotate import reference as rotate_reference
from sixfold.kernels.types import KeyMap
from sixfold.packing import BITS, Bits, Layout, decode_scale
from sixfold.rotation import RotationKind
from tests.kernels.vector_cases import (
    DIMS,
    DTYPES,
    SCALES,
    SLOTS,
    assert_same_bits,
    assert_same_codes,
    coding_of,
    expanded,
    maps_of,
    mixed,
    paged_vectors,
    pages_of,
    tables,
)
from tests.vectors import gaussian

rotate_triton = pytest.importorskip("sixfold.kernels.rotate.triton")
encode_triton = pytest.importorskip("sixfold.kernels.encode.triton")
decode_triton = pytest.importorskip("sixfold.kernels.decode.triton")
scores_triton = pytest.importorskip("sixfold.kernels.scores.triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
QUICK_DIMS = (1, 2, 20, 32, 33, 64, 80, 96, 128, 256)


@pytest.fixture(autouse=True)
def reference_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the references call must not be what they are compared with."""
    monkeypatch.setenv("SIXFOLD_BACKEND", "reference")


def quick(cases: list[tuple[Any, ...]], wanted: Callable[..., bool]) -> list[Any]:
    """Leave all but the wanted ones to the slow tests: every dimension and width appears."""
    slow = pytest.mark.slow
    return [case if wanted(*case) else pytest.param(*case, marks=slow) for case in cases]


def moved(group: Any) -> Any:
    """A tuple of tensors and numbers, or None, on the device."""
    if group is None:
        return None
    return type(group)(*(x.to(DEVICE) if isinstance(x, Tensor) else x for x in group))


def on_device(*tensors: Any) -> list[Any]:
    return [x.to(DEVICE) if isinstance(x, Tensor) else x for x in tensors]


def on_cpu(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    first, second = (x.cpu() for x in tensors)
    return first, second


ROTATIONS = [(dim, inverse) for dim in (*DIMS, 32, 100, 192, 1024) for inverse in (False, True)]


@pytest.mark.parametrize(
    ("dim", "inverse"), quick(ROTATIONS, lambda dim, inverse: dim < 100 and dim != 92)
)
def test_rotate(dim: int, inverse: bool) -> None:
    turns, factor, _ = tables(dim, 1)
    x = gaussian(37, dim, seed=dim)
    got = rotate_triton.rotate(*on_device(x, turns, factor), inverse).cpu()
    expected = rotate_reference.rotate(x, turns, factor, inverse)
    if len(turns):
        assert_same_bits(got, expected)
    else:
        # Sums in float64 in another order, rounded to float32.
        torch.testing.assert_close(got, expected, rtol=2**-23, atol=1e-12)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (2, 0), (3, 17)])
def test_rotate_any_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    turns, factor, _ = tables(96, 1)
    x = gaussian(torch.Size(shape).numel(), 96, seed=1).view(*shape, 96).to(dtype)
    got = rotate_triton.rotate(*on_device(x, turns, factor)).cpu()
    assert_same_bits(got, rotate_reference.rotate(x, turns, factor))


def test_rotate_has_gradients() -> None:
    turns, factor, _ = tables(64, 1)
    x = gaussian(3, 64, seed=1).to(DEVICE).requires_grad_()
    rotate_triton.rotate(x, *on_device(turns, factor)).square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 2 * x.detach(), rtol=1e-5, atol=1e-5)


def assert_encodes(x: Tensor, *arrays: Tensor, bits: Bits, scale: Scale) -> None:
    got = encode_triton.encode(*on_device(x, *arrays), bits=bits, scale=scale)
    assert_same_codes(on_cpu(*got), encode_reference.encode(x, *arrays, bits=bits, scale=scale))


ENCODED = [(dim, bits) for dim in (*DIMS, 32, 100) for bits in BITS]


@pytest.mark.parametrize(
    ("dim", "bits"),
    quick(ENCODED, lambda dim, bits: dim == 32 or (dim in QUICK_DIMS and bits in (3, 3.5))),
)
def test_encode(dim: int, bits: Bits) -> None:
    # Each width takes another dtype and scale at each dimension.
    turn = dim + BITS.index(bits)
    x = mixed(20, dim, seed=dim).to(DTYPES[turn % 3])
    assert_encodes(x, *tables(dim, bits), bits=bits, scale=SCALES[turn // 3 % 3])


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_encode_every_dtype_and_scale(dtype: torch.dtype, scale: Scale) -> None:
    assert_encodes(mixed(20, 64, seed=2).to(dtype), *tables(64, 4), bits=4, scale=scale)


@pytest.mark.parametrize("magnitude", [1e-45, 1e-40, 1e-38, 1e-20, 1e20, 1e38, 3.4e38])
@pytest.mark.parametrize("scale", SCALES)
def test_encode_any_magnitude(magnitude: float, scale: Scale) -> None:
    x = gaussian(20, 64, seed=2).clamp(-1, 1) * magnitude
    assert_encodes(x, *tables(64, 4), bits=4, scale=scale)


@pytest.mark.parametrize("bits", [1, 3, 5, pytest.param(8, marks=pytest.mark.slow)])
def test_ties_and_their_neighbours(bits: Bits) -> None:
    # u = x·(sqrt(2)/‖x‖)·F: coordinates at a boundary, and one float32 to either side of it.
    book = centroids(1024, bits)
    boundaries = ((book[1:] + book[:-1]) / 2).double()
    boundaries = boundaries[:: max(1, len(boundaries) // 4)].repeat_interleave(600)
    steps = (1 + torch.arange(-300, 300) * 2.0**-24).repeat(len(boundaries) // 600)
    other = (2 - boundaries.square()).clamp(min=0).sqrt()
    x = torch.stack((boundaries * steps, other), 1).float()
    assert_encodes(x, torch.zeros(0, 2, 1), torch.eye(2), book, bits=bits, scale="norm")


@pytest.mark.parametrize(
    "levels",
    [
        [-1.5, -0.5, 0.5, 1.5],  # x = (0, 1) is a tie
        [-1.0, -1.0, -1.0, 2.0],  # equal boundaries
        [0.0, 1e-30, 1.0, 1.4],  # far from uniform
    ],
)
def test_codebooks_of_any_spacing(levels: list[float]) -> None:
    x = torch.cat((gaussian(200, 2, seed=4), torch.eye(2), -torch.eye(2), 1e-30 + torch.eye(2)))
    book = torch.tensor(levels)
    assert_encodes(x, torch.zeros(0, 2, 1), torch.eye(2), book, bits=2, scale="norm")


def test_float64_is_left_to_the_reference() -> None:
    x = gaussian(50, 64, seed=5).double() * 1e200
    assert_encodes(x, *tables(64, 4), bits=4, scale="norm")


def test_encode_any_number_of_vectors() -> None:
    for shape in [(), (0,), (2, 0), (130,)]:
        x = gaussian(torch.Size(shape).numel(), 32, seed=6).view(*shape, 32)
        assert_encodes(x, *tables(32, 4), bits=4, scale="optimal")


DECODED = [(dim, bits) for dim in (*DIMS, 32, 100) for bits in BITS]


@pytest.mark.parametrize(
    ("dim", "bits"),
    quick(DECODED, lambda dim, bits: dim == 32 or (dim in QUICK_DIMS and bits in (3, 3.5))),
)
@pytest.mark.parametrize("kind", ["hadamard", pytest.param("orthogonal", marks=pytest.mark.slow)])
def test_decode(dim: int, bits: Bits, kind: RotationKind) -> None:
    turns, factor, book = tables(dim, bits, kind)
    x = mixed(20, dim, seed=dim)
    rows, stored = encode_reference.encode(x, turns, factor, book, bits=bits, scale="optimal")
    arguments = rows, stored, turns, factor, book
    got = decode_triton.decode(*on_device(*arguments), dim=dim, bits=bits).cpu()
    expected = decode_reference.decode(*arguments, dim=dim, bits=bits)
    assert torch.equal(got.isnan().all(-1), got.isnan().any(-1))
    torch.testing.assert_close(got, expected, rtol=2**-22, atol=1e-12, equal_nan=True)
    if len(turns):
        assert torch.equal(got.nan_to_num(), expected.nan_to_num())


PAGES = [
    (dim, bits, layout, mapped)
    for dim in (33, 64, 80, 128)
    for bits in BITS
    for layout in ("key", "value")
    for mapped in (False, True)
]


@pytest.mark.parametrize(
    ("dim", "bits", "layout", "mapped"),
    quick(
        PAGES,
        lambda dim, bits, layout, mapped: (
            mapped == (layout == "key")
            and (dim, bits, layout)
            in {
                (33, 3.5, "key"),
                (64, 4, "key"),
                (64, 2.5, "value"),
                (64, 7, "value"),
                (80, 3, "value"),
                (128, 6, "key"),
            }
        ),
    ),
)
def test_pages(dim: int, bits: Bits, layout: Layout, mapped: bool) -> None:
    x, coding = paged_vectors(dim, torch.bfloat16), coding_of(dim, bits)
    key_map = KeyMap(*maps_of(dim), torch.tensor([1, 0])) if mapped else None
    expected = pages_of(dim, bits)
    got = on_device(*pages_of(dim, bits))
    encode_reference.encode_pages(x, SLOTS, coding, layout, *expected, key_map)
    there = moved(coding), layout, *got, moved(key_map)
    encode_triton.encode_pages(x.to(DEVICE), SLOTS.to(DEVICE), *there)
    assert_same_codes(on_cpu(*got), expected)

    for dtype in (*DTYPES, torch.float64):
        there = moved(coding), layout, dtype, moved(key_map)
        decoded = decode_triton.decode_pages(*on_device(*expected, SLOTS), *there).cpu()
        reference = decode_reference.decode_pages(*expected, SLOTS, coding, layout, dtype, key_map)
        assert decoded.dtype == dtype
        assert torch.equal(decoded.isnan(), reference.isnan())
        if dim != 33:
            assert torch.equal(decoded.nan_to_num(), reference.nan_to_num())
        close = torch.finfo(dtype).eps * 2
        torch.testing.assert_close(decoded, reference, rtol=close, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("layout", ["key", "value"])
@pytest.mark.parametrize(("dim", "bits"), [(33, 3.5), (64, 4), (80, 3)])
def test_expand_pages(dim: int, bits: Bits, layout: Layout) -> None:
    coding, (pages, stored) = coding_of(dim, bits), pages_of(dim, bits)
    pages = torch.randint(0, 256, pages.shape, dtype=torch.uint8)
    got = decode_triton.expand_pages(*on_device(pages, stored), moved(coding), layout).cpu()
    assert_same_bits(got, decode_reference.expand_pages(pages, stored, coding, layout))


@pytest.mark.parametrize(
    "strided",
    [
        lambda x: x,
        lambda x: x.contiguous(),
        lambda x: x.mT.contiguous().mT,
        lambda x: x[:, :1].expand(-1, 2, -1, -1),
        lambda x: torch.nn.functional.pad(x, (3, 2))[..., 3:-2],
    ],
)
def test_pages_of_any_strides(strided: Callable[[Tensor], Tensor]) -> None:
    x = strided(paged_vectors(64, torch.float16))
    expected, got = pages_of(64, 3), on_device(*pages_of(64, 3))
    coding = coding_of(64, 3, "unbiased")
    encode_reference.encode_pages(x, SLOTS, coding, "key", *expected)
    slots = SLOTS.to(DEVICE).mT.contiguous().mT
    x = strided(paged_vectors(64, torch.float16)).to(DEVICE)
    encode_triton.encode_pages(x, slots, moved(coding), "key", *got)
    assert_same_codes(on_cpu(*got), expected)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("dim", "batch", "n", "n_queries"),
    [(1, (), 1, 1), (20, (2,), 33, 3), (80, (), 500, 9), (64, (3,), 0, 3), (128, (2, 2), 40, 0)],
)
def test_scores(dim: int, batch: tuple[int, ...], n: int, n_queries: int, bits: Bits) -> None:
    turns, factor, book = tables(dim, bits)
    count = torch.Size(batch).numel() * n
    x = gaussian(count, dim, seed=4).view(*batch, n, dim)
    rows, stored = encode_reference.encode(x, turns, factor, book, bits=bits, scale="unbiased")
    stored[..., n // 2 : n // 2 + 1] = torch.nan
    queries = gaussian(torch.Size(batch).numel() * n_queries, dim, seed=5)
    queries = queries.view(*batch, n_queries, dim)
    got = scores_triton.scores(*on_device(queries, rows, stored, book), bits=bits).cpu()
    exact = queries.double() @ expanded(rows, book, dim, bits).double().mT
    exact = exact * decode_scale(stored)[..., None, :]
    # Rounding of sums of dim products.
    bound = queries.norm(dim=-1)[..., None] * decode_scale(stored)[..., None, :] * dim**0.5
    close = (got - exact).abs() <= 2**-22 * bound
    assert (close | exact.isnan()).all()
    assert torch.equal(got.isnan(), exact.isnan())


@pytest.mark.usefixtures("unhooked")
def test_tensors_that_do_not_fit_are_refused() -> None:
    turns, factor, book = on_device(*tables(64, 4))
    x = gaussian(5, 64, seed=1).to(DEVICE)
    with pytest.raises(ShapeError, match=r"dim = m·2\^k.*Rotation\(60\)"):
        rotate_triton.rotate(x[:, :60], turns, factor)
    with pytest.raises(ShapeError, match="turns: expected"):
        rotate_triton.rotate(gaussian(5, 128, seed=1).to(DEVICE), turns, factor)
    with pytest.raises(ShapeError, match="centroids: expected"):
        encode_triton.encode(x, turns, factor, book, bits=5, scale="norm")
    rows, stored = encode_triton.encode(x, turns, factor, book, bits=4, scale="norm")
    with pytest.raises(ShapeError, match="rows: expected"):
        decode_triton.decode(rows[:, :-4], stored, turns, factor, book, dim=64, bits=4)
    with pytest.raises(ShapeError, match="rows: expected"):
        scores_triton.scores(x[None], rows, stored, book, bits=4)
    pages, scales = on_device(*pages_of(64, 4))
    slots, coding = SLOTS.to(DEVICE), moved(coding_of(64, 4))
    with pytest.raises(ShapeError, match="codes: expected"):
        decode_triton.decode_pages(pages[:, :, 4:], scales, slots, coding, "key", torch.float32)
    x = paged_vectors(64)[:, :, :64].to(DEVICE)
    with pytest.raises(ShapeError, match=r"x: expected \[2, 2, 128, dim\].*got \[2, 2, 64, 64\]"):
        encode_triton.encode_pages(x, slots, coding, "key", pages, scales)
    assert (pages == 7).all()
