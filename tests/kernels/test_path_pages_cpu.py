"""The compiled encoding and decoding of pages of paths against the reference, bit for bit."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sixfold.errors import ShapeError
from sixfold.kernels.decode import reference as decode_reference
from sixfold.kernels.encode import reference as encode_reference
from sixfold.kernels.types import Coding, KeyMap, Pool, Scale
from sixfold.packing import Bits, Layout
from sixfold.trellis import codewords
from tests.kernels.path_cases import SHAPES, case_of, coding_of, expected_pages, pages_of
from tests.kernels.vector_cases import (
    DTYPES,
    SCALES,
    SLOTS,
    assert_same_bits,
    assert_same_codes,
    maps_of,
    paged_vectors,
)
from tests.threads import on_threads
from tests.vectors import gaussian, generator

_cpu = pytest.importorskip("sixfold._cpu")
encode_cpu = pytest.importorskip("sixfold.kernels.encode.cpu")
decode_cpu = pytest.importorskip("sixfold.kernels.decode.cpu")


@pytest.fixture(autouse=True, params=_cpu.available_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs on every instruction set of this processor."""
    monkeypatch.setenv("SIXFOLD_ISA", request.param)
    # What the references call must not be what they are compared with.
    monkeypatch.setenv("SIXFOLD_BACKEND", "reference")
    return str(request.param)


def check_encode(
    x: Tensor, coding: Coding, layout: Layout = "key", key_map: KeyMap | None = None
) -> None:
    got, expected = pages_of(coding), pages_of(coding)
    for backend, target in ((encode_cpu, got), (encode_reference, expected)):
        backend.encode_pages(x, SLOTS, coding, layout, *target, key_map)
    assert_same_codes(got, expected)


def check_decode(
    pages: tuple[Tensor, Tensor], coding: Coding, layout: Layout, key_map: KeyMap | None
) -> None:
    for dtype in (*DTYPES, torch.float64):
        arguments = (*pages, SLOTS, coding, layout, dtype, key_map)
        got, expected = (x.decode_pages(*arguments) for x in (decode_cpu, decode_reference))
        assert got.dtype == dtype
        assert torch.equal(got.isnan(), expected.isnan())
        if len(coding.turns):
            assert torch.equal(got.nan_to_num(), expected.nan_to_num())
        close = torch.finfo(dtype).eps * 2
        torch.testing.assert_close(got, expected, rtol=close, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("layout", ["key", "value"])
@pytest.mark.parametrize(("dim", "bits"), SHAPES)
def test_pages(dim: int, bits: Bits, layout: Layout) -> None:
    x, coding, key_map = case_of(dim, bits, layout)
    got, expected = pages_of(coding), expected_pages(dim, bits, layout)
    encode_cpu.encode_pages(x, SLOTS, coding, layout, *got, key_map)
    assert_same_codes(got, expected)
    check_decode(expected, coding, layout, key_map)


@pytest.mark.parametrize("layout", ["key", "value"])
@pytest.mark.parametrize(("dim", "bits"), SHAPES)
def test_any_bytes_decode(dim: int, bits: Bits, layout: Layout) -> None:
    # A dense rotation of a large size is slow to make.
    coding = coding_of(dim, bits, kind="orthogonal" if dim in (24, 72) else "hadamard")
    pages, stored = pages_of(coding)
    pages.random_(0, 256, generator=generator(1))
    stored.uniform_(0, 3, generator=generator(2))[:, :, ::9] = torch.nan
    check_decode((pages, stored), coding, layout, KeyMap(*maps_of(dim)))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_any_dtype_and_scale(dtype: torch.dtype, scale: Scale) -> None:
    for bits in (2.5, 4):
        check_encode(paged_vectors(32, dtype), coding_of(32, bits, scale))


@pytest.mark.parametrize("shared", [False, True])
def test_maps_by_index(shared: bool) -> None:
    maps = KeyMap(*maps_of(40), torch.tensor([1, 1] if shared else [1, 0]))
    check_encode(paged_vectors(40), coding_of(40, 2), "key", maps)


@pytest.mark.parametrize(
    "strided",
    [
        lambda x: x.contiguous(),
        lambda x: x.mT.contiguous().mT,
        lambda x: x[:, :1].expand(-1, 2, -1, -1),
        lambda x: torch.nn.functional.pad(x, (3, 2))[..., 3:-2],
    ],
)
def test_vectors_of_any_strides(strided: Callable[[Tensor], Tensor]) -> None:
    check_encode(strided(paged_vectors(64, torch.float16)), coding_of(64, 3))


@pytest.mark.parametrize("layout", ["key", "value"])
def test_pools_of_any_strides(layout: Layout) -> None:
    """Heads before slots, pages apart: what is between them is left alone."""
    x, coding = paged_vectors(32), coding_of(32, 2.5)
    expected = pages_of(coding)
    encode_reference.encode_pages(x, SLOTS, coding, layout, *expected)
    wide = [torch.full((2, 5, y.shape[2] + 3), 9, dtype=y.dtype) for y in expected]
    got = [y.fill_(9)[..., :-3].copy_(7 + 0 * y[..., :-3]).transpose(0, 1) for y in wide]
    encode_cpu.encode_pages(x, SLOTS.mT.contiguous().mT, coding, layout, *got)
    assert_same_codes((got[0], got[1]), expected)
    assert all((y[..., -3:] == 9).all() for y in wide)
    decoded = decode_cpu.decode_pages(*got, SLOTS, coding, layout, torch.float32)
    assert_same_bits(
        decoded.nan_to_num(),
        decode_reference.decode_pages(*expected, SLOTS, coding, layout, torch.float32).nan_to_num(),
    )


def test_both_sides_at_once_and_again() -> None:
    """A slot that was written before keeps nothing of it; codes of both kinds go together."""
    keys, values = paged_vectors(64, torch.bfloat16), paged_vectors(32, torch.bfloat16)
    paths, key_map = coding_of(64, 2), KeyMap(*maps_of(64))
    for value_coding in (coding_of(32, 4), coding_of(32, 3)._replace(scale="norm")):
        got, expected = (
            Pool(*pages_of(paths, fill), *pages_of(value_coding, fill)) for fill in (7, 200)
        )
        arguments = paths, value_coding, key_map
        encode_cpu.store_pages(keys.flip(2), values.flip(2), SLOTS, got, *arguments)
        for backend, pool in ((encode_cpu, got), (encode_reference, expected)):
            backend.store_pages(keys, values, SLOTS, pool, *arguments)
        for one, other in ((got[:2], expected[:2]), (got[2:], expected[2:])):
            assert_same_codes(*((codes[SLOTS], scales[SLOTS]) for codes, scales in (one, other)))


def test_codewords_are_known_by_their_numbers() -> None:
    x, book = paged_vectors(32), codewords(128, 2).clone()
    coding = coding_of(32, 2)._replace(centroids=book)
    for _ in range(3):
        check_encode(x, coding)
        book.mul_(0.9)


@pytest.mark.parametrize(
    ("bits", "error"), [(1, 0.2865), (2, 0.0764), (2.5, 0.0409), (3, 0.0202), (4, 0.0055)]
)
def test_error_of_a_round_trip(bits: Bits, error: float) -> None:
    x, coding = gaussian(512, 128, seed=3).view(2, 2, 128, 128), coding_of(128, bits)
    pages = pages_of(coding)
    encode_cpu.encode_pages(x, SLOTS, coding, "value", *pages)
    decoded = decode_cpu.decode_pages(*pages, SLOTS, coding, "value", torch.float32)
    lost = ((x - decoded).square().sum(-1) / x.square().sum(-1)).mean()
    assert lost == pytest.approx(error, rel=0.02)


def test_number_of_threads_does_not_show() -> None:
    x, coding = gaussian(512, 128, seed=3).view(2, 2, 128, 128), coding_of(128, 2.5)

    def everything() -> list[Tensor]:
        pages = pages_of(coding)
        encode_cpu.encode_pages(x, SLOTS, coding, "key", *pages)
        return [*pages, decode_cpu.decode_pages(*pages, SLOTS, coding, "key", torch.float32)]

    alone, together = on_threads(everything, 1, 5)
    for one, other in zip(alone, together, strict=True):
        assert_same_bits(other, one)


@pytest.mark.parametrize("slots", [[[0, 5]], [[-1, 0]], [[0, 2**40]]])
@pytest.mark.usefixtures("unhooked")
def test_slots_out_of_range_touch_nothing(slots: list[list[int]]) -> None:
    coding, table = coding_of(32, 2), torch.tensor(slots)
    pages, stored = pages_of(coding)
    with pytest.raises(ShapeError, match=r"slots: expected.*0 to 4, got"):
        encode_cpu.encode_pages(paged_vectors(32)[:1], table, coding, "key", pages, stored)
    assert (pages == 7).all()
    with pytest.raises(ShapeError, match=r"slots: expected.*0 to 4, got"):
        decode_cpu.decode_pages(pages, stored, table, coding, "key", torch.float32)


@pytest.mark.usefixtures("unhooked")
def test_tensors_that_do_not_fit_are_refused() -> None:
    x, coding = paged_vectors(64), coding_of(64, 2)
    pages, stored = pages_of(coding)
    few = coding._replace(centroids=coding.centroids[:100])
    for wrong, match in ((few, "codewords: expected one of"), (coding_of(64, 4), "codes: exp")):
        with pytest.raises(ShapeError, match=match):
            encode_cpu.encode_pages(x, SLOTS, wrong, "key", pages, stored)
        with pytest.raises(ShapeError, match=match):
            decode_cpu.decode_pages(pages, stored, SLOTS, wrong, "key", torch.float32)
    with pytest.raises(ShapeError, match="x: expected"):
        encode_cpu.encode_pages(x[:, :, :64], SLOTS, coding, "key", pages, stored)
    assert (pages == 7).all()
