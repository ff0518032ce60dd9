"""Triton's encoding and decoding of pages of paths against the reference, bit for bit.

In Triton's interpreter where there is no GPU; on one, the same tests run the compiled kernels.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("sixfold.kernels._triton", exc_type=ImportError)

from sixfold.errors import ShapeError
from sixfold.kernels.decode import reference as decode_reference
from sixfold.kernels.encode import reference as encode_reference
from sixfold.kernels.types import Coding, KeyMap, Pool, Scale
from sixfold.packing import PAGE_TOKENS, Bits, Layout, to_pages
from tests.kernels.path_cases import SHAPES, case_of, coding_of, pages_of
from tests.kernels.test_attention_layers_triton import NoKernel
from tests.kernels.test_vectors_triton import DEVICE, moved, on_cpu, on_device
from tests.kernels.vector_cases import (
    DTYPES,
    SLOTS,
    assert_same_bits,
    assert_same_codes,
    maps_of,
    paged_vectors,
)
from tests.kernels.vector_cases import coding_of as symbols_of
from tests.vectors import generator

encode_triton = pytest.importorskip("sixfold.kernels.encode.triton")
path_pages = pytest.importorskip("sixfold.kernels._triton.path_pages")
decode_triton = pytest.importorskip("sixfold.kernels.decode.triton")

QUICK = {(32, 1), (40, 2), (48, 2.5), (72, 3), (20, 4), (128, 2.5)}


@pytest.fixture(autouse=True)
def reference_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the references call must not be what they are compared with."""
    monkeypatch.setenv("SIXFOLD_BACKEND", "reference")


def quick(shapes: set[tuple[int, Bits]]) -> list[Any]:
    """Every shape; all but these are slow tests."""
    slow = pytest.mark.slow
    return [shape if shape in shapes else pytest.param(*shape, marks=slow) for shape in SHAPES]


def random_pages(coding: Coding, layout: Layout) -> tuple[Tensor, Tensor]:
    """Any bytes are paths; those of a row behind its path are zero."""
    pages, stored = pages_of(coding)
    size, symbol_bits = coding.row
    rows = torch.randint(256, (*stored.shape, size), generator=generator(1), dtype=torch.uint8)
    rows[..., int(coding.dim * coding.bits) // 8 :] = 0
    pages[:] = to_pages(rows, size, symbol_bits, layout)
    stored.uniform_(0, 3, generator=generator(2))[:, :, ::9] = torch.nan
    return pages, stored


@pytest.mark.parametrize("layout", ["key", "value"])
@pytest.mark.parametrize(("dim", "bits"), quick(QUICK))
def test_any_bytes_decode(dim: int, bits: Bits, layout: Layout) -> None:
    coding, key_map = coding_of(dim, bits), KeyMap(*maps_of(dim))
    pages = random_pages(coding, layout)
    dtype = DTYPES[dim // 8 % 3]
    there = moved(coding), layout, dtype, moved(key_map)
    got = decode_triton.decode_pages(*on_device(*pages, SLOTS), *there).cpu()
    expected = decode_reference.decode_pages(*pages, SLOTS, coding, layout, dtype, key_map)
    assert got.dtype == dtype
    assert torch.equal(got.isnan(), expected.isnan())
    if len(coding.turns):
        assert torch.equal(got.nan_to_num(), expected.nan_to_num())
    close = torch.finfo(dtype).eps * 2
    torch.testing.assert_close(got, expected, rtol=close, atol=1e-9, equal_nan=True)


def check_encode(
    x: Tensor, coding: Coding, layout: Layout = "key", key_map: KeyMap | None = None
) -> None:
    got, expected = ([y[:, : x.shape[1]].clone() for y in pages_of(coding)] for _ in range(2))
    slots, there = SLOTS[: len(x), : x.shape[2] // PAGE_TOKENS], on_device(*got)
    encode_reference.encode_pages(x, slots, coding, layout, *expected, key_map)
    encode_triton.encode_pages(
        x.to(DEVICE), slots.to(DEVICE), moved(coding), layout, *there, moved(key_map)
    )
    assert_same_codes(on_cpu(*there), (expected[0], expected[1]))


def check_page(dim: int, bits: Bits, layout: Layout, scale: Scale) -> None:
    """One page of one head: the search is slow to interpret."""
    x, coding, key_map = case_of(dim, bits, layout)
    own = None if key_map is None else KeyMap(*(y[:1, :1] for y in key_map[:2]))
    check_encode(x[:1, :1, :PAGE_TOKENS], coding._replace(scale=scale), layout, own)


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "bits"), SHAPES)
def test_encode_every_shape(dim: int, bits: Bits) -> None:
    check_page(dim, bits, "key" if dim % 16 else "value", "optimal")


@pytest.mark.parametrize(
    ("dim", "bits", "layout", "scale"),
    [
        (32, 1, "value", "norm"),
        (20, 2, "key", "optimal"),
        (32, 2.5, "value", "unbiased"),
        (24, 3, "key", "unbiased"),
        (20, 4, "value", "optimal"),
    ],
)
def test_encode(dim: int, bits: Bits, layout: Layout, scale: Scale) -> None:
    check_page(dim, bits, layout, scale)


def test_pages_are_searched_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four pages of two heads, strided, one by one."""
    monkeypatch.setattr(path_pages, "INTERPRETED_PROGRAMS", 1)
    path_pages._programs.cache_clear()
    x, key_map = paged_vectors(8), KeyMap(*maps_of(8), torch.tensor([1, 0]))
    check_encode(torch.nn.functional.pad(x, (3, 2))[..., 3:-2], coding_of(8, 4), "key", key_map)
    path_pages._programs.cache_clear()


def test_wide_vectors_are_left_to_the_reference() -> None:
    check_encode(paged_vectors(20)[:1, :1].double(), coding_of(20, 4))


def test_a_trellis_beside_a_codebook() -> None:
    x = [paged_vectors(dim)[:1, :1, :PAGE_TOKENS] for dim in (20, 20)]
    paths = coding_of(20, 4)
    for codings in ((paths, symbols_of(20, 3)), (symbols_of(20, 3), paths)):
        got, expected = (
            Pool(*(y[:, :1].clone() for c in codings for y in pages_of(c))) for _ in range(2)
        )
        encode_reference.store_pages(*x, SLOTS[:1, :1], expected, *codings)
        there = Pool(*on_device(*got))
        encode_triton.store_pages(
            *on_device(*x, SLOTS[:1, :1]), there, *(moved(coding) for coding in codings)
        )
        assert_same_codes(on_cpu(*there[:2]), expected[:2])
        assert_same_codes(on_cpu(*there[2:]), expected[2:])


@pytest.mark.parametrize("layout", ["key", "value"])
@pytest.mark.parametrize(("dim", "bits"), [(64, 2.5), (80, 3)])
def test_expand_pages(dim: int, bits: Bits, layout: Layout) -> None:
    coding = coding_of(dim, bits)
    pages = random_pages(coding, layout)
    got = decode_triton.expand_pages(*on_device(*pages), moved(coding), layout).cpu()
    expected = decode_reference.expand_pages(*pages, coding, layout)
    assert torch.equal(got.isnan(), expected.isnan())
    assert_same_bits(got.nan_to_num(), expected.nan_to_num())


@pytest.mark.usefixtures("unhooked")
def test_tensors_that_do_not_fit_are_refused() -> None:
    coding = coding_of(64, 2)
    pages, stored = on_device(*pages_of(coding))
    few = coding._replace(centroids=coding.centroids[:100])
    wrong = (
        (few, r"centroids: expected \[128\]"),
        (coding_of(64, 4), "codes: exp"),
        (coding_of(20, 2)._replace(bits=3.5), "trellis pages: expected"),
    )
    for other, match in wrong:
        with pytest.raises(ShapeError, match=match):
            decode_triton.decode_pages(
                pages, stored, SLOTS.to(pages.device), moved(other), "key", torch.float32
            )


def test_the_launcher_asks_no_tensor_for_its_content(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a synchronisation")

    kernels = NoKernel(), NoKernel()
    monkeypatch.setattr(path_pages, "path_vectors_kernel", kernels[0])
    monkeypatch.setattr(path_pages, "search_kernel", kernels[1])
    coding, x = coding_of(32, 2), paged_vectors(32)
    arguments = (x, *maps_of(32), *coding[:3], *pages_of(coding), SLOTS, 2.0, "norm", "key")
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "nonzero", "numpy", "cpu"):
        monkeypatch.setattr(Tensor, name, refuse)
    path_pages.encode_path_pages(*arguments)
    # Two pages of two heads at a time, of four.
    assert [kernel.launches for kernel in kernels] == [4, 2]


@pytest.mark.usefixtures("unhooked")
def test_the_operator_is_well_formed() -> None:
    coding = coding_of(20, 4)
    x, pages = paged_vectors(20)[:1, :1, :PAGE_TOKENS], (y[:, :1] for y in pages_of(coding))
    arguments = (x, None, None, *coding[:3], *pages, SLOTS[:1, :1], 4.0, "norm", "value")
    torch.library.opcheck(torch.ops.sixfold.encode_path_pages.default, arguments)
