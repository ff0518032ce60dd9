"""Triton's encoding and decoding of pages of paths against the reference, bit for bit.

In Triton's interpreter where there is no GPU; on one, the same tests run the compiled kernels.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from sixfold.errors import ShapeError
from sixfold.kernels.decode import reference as decode_reference
from sixfold.kernels.types import Coding, KeyMap
from sixfold.packing import Bits, Layout, to_pages
from tests.kernels.path_cases import SHAPES, coding_of, pages_of
from tests.kernels.test_vectors_triton import moved, on_device
from tests.kernels.vector_cases import DTYPES, SLOTS, assert_same_bits, maps_of
from tests.vectors import generator

pytest.importorskip("triton", reason="Triton is not installed")
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
