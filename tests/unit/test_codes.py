"""Codes behave like a tensor over their batch axes, and count every byte."""

import dataclasses
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch

import sixfold
from sixfold.codes import Codes
from sixfold.errors import SixfoldError
from tests.vectors import gaussian

DIM = 48
QUANTIZERS: list[Any] = [
    sixfold.TurboQuantMSE(DIM, 3),
    sixfold.TurboQuantProd(DIM, 3),
    sixfold.TurboQuantProd(DIM, 1),
    sixfold.QJL(DIM, 40),
    sixfold.PolarQuant(DIM),
    sixfold.OutlierSplit(DIM, outlier_channels=8),
    sixfold.TrellisQuantizer(DIM, 3),
]
INDICES: list[Any] = [
    1,
    -1,
    slice(1, 3),
    slice(None, None, 2),
    (0, 2),
    (..., 4),
    (slice(None), slice(2, 4)),
    (0, ..., slice(1, None)),
    ([1, 0], [2, 5]),
    (None, 0),
    torch.tensor([2, 0]),
    torch.tensor([True, False, True]),
    (slice(None), torch.tensor([[0, 1], [1, 0]])),
    ...,
    (),
]


@pytest.fixture(params=QUANTIZERS, ids=repr)
def quantizer(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def codes(quantizer: Any) -> Codes:
    codes: Codes = quantizer.encode(gaussian(3 * 6, DIM, seed=0).view(3, 6, DIM))
    return codes


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_indexing_commutes_with_decoding(quantizer: Any, codes: Codes, index: Any) -> None:
    part = codes[index]
    # Codes have no axis of coordinates: an ellipsis stands for batch axes alone.
    has_ellipsis = isinstance(index, tuple) and any(entry is ... for entry in index)
    expected = quantizer.decode(codes)[(*index, slice(None)) if has_ellipsis else index]
    assert torch.equal(quantizer.decode(part), expected)
    assert part.shape == expected.shape
    assert type(part) is type(codes)


def test_shape_length_and_device(codes: Codes) -> None:
    assert codes.shape == (3, 6, DIM)
    assert len(codes) == 3
    assert [part.shape for part in codes] == [(6, DIM)] * 3  # type: ignore[attr-defined]
    assert codes.device == torch.device("cpu")
    assert codes.to("meta").device == torch.device("meta")
    with pytest.raises(TypeError, match="single vector"):
        len(codes[0, 0])


@pytest.mark.parametrize("index", [3, (0, 6), (0, 0, 0), (..., 0, 0, 0)], ids=str)
def test_indexing_past_the_batch_is_an_error(codes: Codes, index: Any) -> None:
    with pytest.raises(IndexError):
        codes[index]


def test_codes_are_frozen(codes: Codes) -> None:
    with pytest.raises(FrozenInstanceError):
        codes.spec = None  # type: ignore[misc, assignment]


def test_every_byte_is_counted() -> None:
    x = gaussian(10, 128, seed=0)
    mse = sixfold.TurboQuantMSE(128, 3).encode(x)
    assert mse.nbytes == 10 * (48 + 2)
    assert mse.bits_per_value == 3 + 16 / 128
    prod = sixfold.TurboQuantProd(128, 3).encode(x)
    assert prod.nbytes == 10 * (32 + 2 + 16 + 2)
    assert sixfold.TurboQuantProd(128, 1).encode(x).nbytes == 10 * (16 + 2)
    assert sixfold.QJL(128, 200).encode(x).nbytes == 10 * (28 + 2)
    # Level by level 32 + 8 + 4 bytes and 2 padded to 4; eight radii.
    assert sixfold.PolarQuant(128).encode(x).nbytes == 10 * (48 + 16)
    assert sixfold.PolarQuant(120).encode(x[:, :120]).nbytes == 10 * (48 + 16)
    # 32 channels at 3 bits, 96 at 2, two scales; the list of channels once for all tokens.
    split = sixfold.OutlierSplit(128).encode(x)
    assert split.nbytes == 10 * (12 + 24 + 2 * 2) + 32 * 4
    assert split[:5].nbytes == 5 * 40 + 32 * 4
    assert sixfold.TurboQuantMSE(128, 2.5).encode(x).nbytes == 10 * (32 + 8 + 2)
    assert sixfold.TrellisQuantizer(128, 2.5).encode(x).nbytes == 10 * (40 + 2)
    # 37 bits of 15 coordinates, in whole words.
    assert sixfold.TrellisQuantizer(15, 2.5).encode(x[:, :15]).nbytes == 10 * (8 + 2)


@pytest.mark.parametrize("verb", ["decode", "scores"])
def test_codes_of_another_quantizer_are_refused(quantizer: Any, codes: Codes, verb: str) -> None:
    other = dataclasses.replace(quantizer, seed=1)
    queries = () if verb == "decode" else (gaussian(3, DIM, seed=0).view(3, 1, DIM),)
    with pytest.raises(SixfoldError, match=r"made by .*seed=0.*read by .*seed=1"):
        getattr(other, verb)(*queries, codes)


@pytest.mark.usefixtures("unhooked")
def test_what_is_no_codes_at_all_is_refused(quantizer: Any) -> None:
    foreign = sixfold.QJL(DIM, 7).encode(gaussian(2, DIM, seed=0))
    for wrong in (foreign, torch.zeros(2, DIM), None):
        with pytest.raises(SixfoldError, match=r"reads|made by"):
            quantizer.decode(wrong)
