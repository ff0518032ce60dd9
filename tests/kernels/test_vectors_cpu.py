"""The compiled rotate, encode, decode and scores against the references, bit for bit."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sixfold.codebooks import centroids
from sixfold.errors import ShapeError
from sixfold.kernels.decode import reference as decode_reference
from sixfold.kernels.encode import Scale
from sixfold.kernels.encode import reference as encode_reference
from sixfold.kernels.rotate import reference as rotate_reference
from sixfold.kernels.scores import reference as scores_reference
from sixfold.kernels.types import KeyMap
from sixfold.packing import (
    BITS,
    Bits,
    Layout,
    decode_scale,
)
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
from tests.threads import on_threads
from tests.vectors import gaussian, generator

_cpu = pytest.importorskip("sixfold._cpu")
rotate_cpu = pytest.importorskip("sixfold.kernels.rotate.cpu")
encode_cpu = pytest.importorskip("sixfold.kernels.encode.cpu")
decode_cpu = pytest.importorskip("sixfold.kernels.decode.cpu")
scores_cpu = pytest.importorskip("sixfold.kernels.scores.cpu")


@pytest.fixture(autouse=True, params=_cpu.available_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs on every instruction set of this processor."""
    monkeypatch.setenv("SIXFOLD_ISA", request.param)
    # What the references call must not be what they are compared with.
    monkeypatch.setenv("SIXFOLD_BACKEND", "reference")
    return str(request.param)


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dim", [*DIMS, 12, 192, 384, 1024, 3072])
def test_rotate(dim: int, inverse: bool, kind: RotationKind) -> None:
    if kind == "orthogonal" and dim > 600:
        pytest.skip("a dense rotation of that size is slow to make")
    turns, factor, _ = tables(dim, 1, kind)
    x = gaussian(37, dim, seed=dim)
    got = rotate_cpu.rotate(x, turns, factor, inverse)
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
    x = torch.randn(*shape, 96, generator=generator(1)).to(dtype)
    assert_same_bits(rotate_cpu.rotate(x, turns, factor), rotate_reference.rotate(x, turns, factor))


def test_rotate_has_gradients() -> None:
    turns, factor, _ = tables(64, 1)
    x = gaussian(3, 64, seed=1).requires_grad_()
    rotate_cpu.rotate(x, turns, factor).square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 2 * x.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", DIMS)
def test_encode(dim: int, bits: Bits, dtype: torch.dtype, scale: Scale) -> None:
    arguments = (mixed(40, dim, seed=dim).to(dtype), *tables(dim, bits))
    assert_same_codes(
        encode_cpu.encode(*arguments, bits=bits, scale=scale),
        encode_reference.encode(*arguments, bits=bits, scale=scale),
    )


@pytest.mark.parametrize("bits", BITS)
def test_encode_large_batches(bits: Bits) -> None:
    arguments = (gaussian(20_000, 64, seed=3), *tables(64, bits))
    assert_same_codes(
        encode_cpu.encode(*arguments, bits=bits, scale="optimal"),
        encode_reference.encode(*arguments, bits=bits, scale="optimal"),
    )


@pytest.mark.parametrize("magnitude", [1e-45, 1e-40, 1e-38, 1e-20, 1e20, 1e38, 3.4e38])
@pytest.mark.parametrize("scale", SCALES)
def test_encode_any_magnitude(magnitude: float, scale: Scale) -> None:
    x = gaussian(50, 128, seed=2).clamp(-1, 1) * magnitude
    arguments = (x, *tables(128, 4))
    assert_same_codes(
        encode_cpu.encode(*arguments, bits=4, scale=scale),
        encode_reference.encode(*arguments, bits=4, scale=scale),
    )


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
def test_ties_and_their_neighbours(bits: Bits) -> None:
    # u = x·(sqrt(2)/‖x‖)·F: coordinates at a boundary, and one float32 to either side of it.
    book = centroids(1024, bits)
    boundaries = ((book[1:] + book[:-1]) / 2).tolist()
    turns, factor = torch.zeros(0, 2, 1), torch.eye(2)
    for level in boundaries[:: max(1, len(boundaries) // 16)]:
        angle = torch.tensor([[level, max(2 - level * level, 0) ** 0.5]], dtype=torch.float64)
        steps = (1 + torch.arange(-300, 300) * 2.0**-24)[:, None]
        x = torch.cat((angle[:, :1] * steps, angle[:, 1:].expand(600, 1)), 1).float()
        arguments = (x, turns, factor, book)
        assert_same_codes(
            encode_cpu.encode(*arguments, bits=bits, scale="norm"),
            encode_reference.encode(*arguments, bits=bits, scale="norm"),
        )


@pytest.mark.parametrize(
    "levels",
    [
        [-1.5, -0.5, 0.5, 1.5],  # x = (0, 1) is a tie
        [-1.0, -1.0, -1.0, 2.0],  # equal boundaries
        [0.0, 1e-30, 1.0, 1.4],  # far from uniform
        [0.0, 0.0, 0.0, 0.0],
    ],
)
def test_codebooks_of_any_spacing(levels: list[float]) -> None:
    x = torch.cat((gaussian(200, 2, seed=4), torch.eye(2), -torch.eye(2), 1e-30 + torch.eye(2)))
    arguments = (x, torch.zeros(0, 2, 1), torch.eye(2), torch.tensor(levels))
    assert_same_codes(
        encode_cpu.encode(*arguments, bits=2, scale="norm"),
        encode_reference.encode(*arguments, bits=2, scale="norm"),
    )


def test_float64_is_left_to_the_reference() -> None:
    arguments = (gaussian(50, 64, seed=5).double() * 1e200, *tables(64, 4))
    assert_same_codes(
        encode_cpu.encode(*arguments, bits=4, scale="norm"),
        encode_reference.encode(*arguments, bits=4, scale="norm"),
    )


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", DIMS)
def test_decode(dim: int, bits: Bits, kind: RotationKind) -> None:
    turns, factor, book = tables(dim, bits, kind)
    x = mixed(30, dim, seed=dim)
    rows, stored = encode_reference.encode(x, turns, factor, book, bits=bits, scale="optimal")
    arguments = rows, stored, turns, factor, book
    got = decode_cpu.decode(*arguments, dim=dim, bits=bits)
    expected = decode_reference.decode(*arguments, dim=dim, bits=bits)
    assert torch.equal(got.isnan().all(-1), got.isnan().any(-1))
    torch.testing.assert_close(got, expected, rtol=2**-22, atol=1e-12, equal_nan=True)
    if len(turns):
        assert torch.equal(got.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("mapped", [False, True, "indexed"])
@pytest.mark.parametrize("layout", ["key", "value"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [33, 64, 80, 128])
def test_pages(dim: int, bits: Bits, layout: Layout, mapped: bool | str) -> None:
    x, coding, key_map = paged_vectors(dim, torch.bfloat16), coding_of(dim, bits), None
    if mapped:
        index = torch.tensor([1, 1]) if mapped == "indexed" else None
        key_map = KeyMap(*maps_of(dim), index)
    got, expected = pages_of(dim, bits), pages_of(dim, bits)
    for backend, target in ((encode_cpu, got), (encode_reference, expected)):
        backend.encode_pages(x, SLOTS, coding, layout, *target, key_map)
    assert_same_codes(got, expected)

    for dtype in (*DTYPES, torch.float64):
        arguments = (*expected, SLOTS, coding, layout, dtype, key_map)
        decoded = decode_cpu.decode_pages(*arguments)
        reference = decode_reference.decode_pages(*arguments)
        assert decoded.dtype == dtype
        assert torch.equal(decoded.isnan(), reference.isnan())
        if dim != 33:
            assert torch.equal(decoded.nan_to_num(), reference.nan_to_num())
        close = torch.finfo(dtype).eps * 2
        torch.testing.assert_close(decoded, reference, rtol=close, atol=1e-9, equal_nan=True)


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
    got, expected = pages_of(64, 3), pages_of(64, 3)
    slots, coding = SLOTS.mT.contiguous().mT, coding_of(64, 3, "unbiased")
    for backend, target in ((encode_cpu, got), (encode_reference, expected)):
        backend.encode_pages(x, slots, coding, "key", *target)
    assert_same_codes(got, expected)


@pytest.mark.parametrize("slots", [[[0, 5]], [[-1, 0]], [[0, 2**40]]])
@pytest.mark.usefixtures("unhooked")
def test_slots_out_of_range_touch_nothing(slots: list[list[int]]) -> None:
    pages, stored = pages_of(64, 4)
    x, coding, table = paged_vectors(64)[:1], coding_of(64, 4), torch.tensor(slots)
    for encode, decode in ((encode_cpu, decode_cpu), (encode_reference, decode_reference)):
        with pytest.raises(ShapeError, match=r"slots: expected.*0 to 4, got"):
            encode.encode_pages(x, table, coding, "key", pages, stored)
        assert (pages == 7).all()
        with pytest.raises(ShapeError, match=r"slots: expected.*0 to 4, got"):
            decode.decode_pages(pages, stored, table, coding, "key", torch.float32)


@pytest.mark.usefixtures("unhooked")
def test_tensors_that_do_not_fit_are_refused() -> None:
    turns, factor, book = tables(64, 4)
    x = gaussian(5, 64, seed=1)
    with pytest.raises(ShapeError, match=r"dim = m·2\^k.*Rotation\(60\)"):
        rotate_cpu.rotate(gaussian(5, 60, seed=1), turns, factor)
    with pytest.raises(ShapeError, match="turns: expected a contiguous"):
        rotate_cpu.rotate(gaussian(5, 128, seed=1), turns, factor)
    with pytest.raises(ShapeError, match="centroids: expected"):
        encode_cpu.encode(x, turns, factor, book, bits=5, scale="norm")
    rows, stored = encode_cpu.encode(x, turns, factor, book, bits=4, scale="norm")
    with pytest.raises(ShapeError, match="rows: expected"):
        decode_cpu.decode(rows[:, :-4], stored, turns, factor, book, dim=64, bits=4)
    with pytest.raises(ShapeError, match="rows: expected"):
        scores_cpu.scores(x[None], rows, stored, book, bits=4)
    pages, page_scales = pages_of(64, 4)
    arguments = page_scales, SLOTS, coding_of(64, 4), "key", torch.float32
    with pytest.raises(ShapeError, match="codes: expected"):
        decode_cpu.decode_pages(pages[:, :, 1:], *arguments)


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
    got = scores_cpu.scores(queries, rows, stored, book, bits=bits)
    exact = queries.double() @ expanded(rows, book, dim, bits).double().mT
    exact = exact * decode_scale(stored)[..., None, :]
    # Rounding of sums of dim products.
    bound = queries.norm(dim=-1)[..., None] * decode_scale(stored)[..., None, :] * dim**0.5
    close = (got - exact).abs() <= 2**-22 * bound
    assert (close | exact.isnan()).all()
    assert torch.equal(got.isnan(), exact.isnan())


def test_scores_do_not_depend_on_the_batch() -> None:
    turns, factor, book = tables(96, 4)
    x, queries = gaussian(100, 96, seed=1), gaussian(7, 96, seed=2)
    rows, stored = encode_reference.encode(x, turns, factor, book, bits=4, scale="norm")
    whole = scores_cpu.scores(queries, rows, stored, book, bits=4)
    one = scores_cpu.scores(queries[3:4], rows[50:51], stored[50:51], book, bits=4)
    assert torch.equal(whole[3:4, 50:51], one)
    reference = scores_reference.scores(queries, rows, stored, book, bits=4)
    torch.testing.assert_close(whole, reference, rtol=0, atol=1e-4)


def test_number_of_threads_does_not_show() -> None:
    turns, factor, book = tables(128, 4)
    x = gaussian(5000, 128, seed=1)

    def everything() -> list[Tensor]:
        rows, stored = encode_cpu.encode(x, turns, factor, book, bits=4, scale="optimal")
        return [
            rotate_cpu.rotate(x, turns, factor),
            rows,
            stored,
            decode_cpu.decode(rows, stored, turns, factor, book, dim=128, bits=4),
            scores_cpu.scores(x[:5], rows, stored, book, bits=4),
        ]

    alone, together = on_threads(everything, 1, 5)
    for one, other in zip(alone, together, strict=True):
        assert_same_bits(other, one)
