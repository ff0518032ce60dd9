"""What is finite in float16 stays finite when it is decoded and attended, on every backend."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sixfold.cache import CachePolicy, CompressedLayer
from sixfold.kernels._native import extension
from tests.kernels.vector_cases import assert_same_bits
from tests.vectors import gaussian

LARGEST = torch.finfo(torch.float16).max


def backends() -> Iterator[tuple[str, str]]:
    """Backend and instruction set."""
    yield "reference", ""
    compiled = extension()
    if not isinstance(compiled, str):
        yield from (("cpu", isa) for isa in compiled.available_isas())
    yield "triton", ""


def filled() -> tuple[CompressedLayer, Tensor]:
    """Values at the end of float16, of either sign; keys that pick out single tokens."""
    values = (gaussian(200, 64, seed=1).sign() * 64_500).half()[None, None]
    keys = gaussian(200, 64, seed=2).half()[None, None]
    layer = CompressedLayer(keys, values, CachePolicy(value_bits=2, recent_window=0, sink_tokens=0))
    layer.append(keys, values)
    layer.compress()
    return layer, 30 * keys[:, :, 40:50]


@pytest.mark.parametrize(("backend", "isa"), [*backends()])
def test_float16_stays_finite(backend: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "triton":
        pytest.importorskip("sixfold.kernels._triton", exc_type=ImportError)
    monkeypatch.setenv("SIXFOLD_BACKEND", "reference")
    layer, query = filled()
    expected = layer.dequantized()[1]
    attended = layer.fork().attend(query, scaling=0.125)
    monkeypatch.setenv("SIXFOLD_BACKEND", backend)
    if isa:
        monkeypatch.setenv("SIXFOLD_ISA", isa)
    values = layer.dequantized()[1]
    out = layer.fork().attend(query, scaling=0.125)
    assert values.dtype is out.dtype is torch.float16
    for got in (values, out):
        assert got.isfinite().all()
        # The case is one: errors of two bits lead past the end.
        assert (got.abs() == LARGEST).any()
    assert_same_bits(values, expected)
    torch.testing.assert_close(out, attended, rtol=0.05, atol=3000)


@pytest.mark.parametrize(("backend", "isa"), [*backends()])
def test_what_is_not_finite_shows(backend: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "triton":
        pytest.importorskip("sixfold.kernels._triton", exc_type=ImportError)
    monkeypatch.setenv("SIXFOLD_BACKEND", backend)
    if isa:
        monkeypatch.setenv("SIXFOLD_ISA", isa)
    keys, values = (gaussian(128, 64, seed=n).half()[None, None] for n in (3, 4))
    values[0, 0, 5, 7] = math.inf
    layer = CompressedLayer(keys, values, CachePolicy(recent_window=0, sink_tokens=0))
    layer.append(keys, values)
    layer.compress()
    decoded = layer.dequantized()[1]
    assert decoded[0, 0, 5].isnan().any()
    assert decoded[0, 0, 6:].isfinite().all()
