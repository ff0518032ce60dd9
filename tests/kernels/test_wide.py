"""Devices that have no float64, such as Apple's: everything runs, and gives the same but rarely."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sixfold
from sixfold.cache import CachePolicy
from sixfold.kernels import _wide
from sixfold.kernels.trellis.grid import search_grid
from sixfold.packing import Bits
from sixfold.trellis import PAGE_STATES, TRELLIS_BITS, codewords
from tests.layers import Shape, feed

pytestmark = pytest.mark.usefixtures("unhooked")


class NoFloat64(TorchDispatchMode):
    """Refuses float64 as MPS does."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        if any(isinstance(x, Tensor) and x.dtype is torch.float64 for x in tree_leaves(out)):
            raise TypeError("cannot convert a tensor to float64: this device has none")
        return out


@pytest.fixture
def without_float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[TorchDispatchMode]:
    """A mode; tables, which every device gets from the CPU, must have been made before."""
    monkeypatch.setenv("SIXFOLD_BACKEND", "reference")
    _wide._has_float64.cache_clear()
    yield NoFloat64()
    _wide._has_float64.cache_clear()


QUANTIZERS = [
    sixfold.TurboQuantMSE(64, 3),
    sixfold.TurboQuantMSE(64, 3, rotation="orthogonal"),
    sixfold.TurboQuantProd(64, 3),
    sixfold.QJL(64, 64),
    sixfold.PolarQuant(64),
    sixfold.OutlierSplit(64),
    sixfold.TrellisQuantizer(64, 2),
]
VECTORS = torch.randn(1, 100, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda q: type(q).__name__)
def test_quantizers(
    quantizer: Any, without_float64: TorchDispatchMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = quantizer.decode(quantizer.encode(VECTORS))
    monkeypatch.setattr(_wide, "_WITH_FLOAT64", ())
    with without_float64:
        found = quantizer.decode(quantizer.encode(VECTORS))
    differ = (found - expected).norm(dim=-1) > 1e-4 * expected.norm(dim=-1)
    assert differ.float().mean() < 0.05


@pytest.mark.parametrize("code", ["trellis", "codebook"])
def test_a_cache(
    code: Any, without_float64: TorchDispatchMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, policy = Shape(), CachePolicy(8, fit_tokens=0, code=code)
    layers = [shape.layer(policy), shape.layer(policy)]
    expected = feed(layers[0], shape.tokens(200), 190, 9, 1)
    monkeypatch.setattr(_wide, "_WITH_FLOAT64", ())
    with without_float64:
        found = feed(layers[1], shape.tokens(200), 190, 9, 1)
    assert layers[1].history.tokens == 128
    assert (found - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("bits", TRELLIS_BITS)
def test_grids_are_the_same(bits: Bits, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = search_grid(codewords(PAGE_STATES, bits), bits)
    monkeypatch.setattr("sixfold.kernels.trellis.grid.wide", lambda device: torch.float32)
    found = search_grid(codewords(PAGE_STATES, bits), bits)
    assert torch.equal(found.words, expected.words)
    assert torch.equal(found.half, expected.half)
    assert torch.equal(found.rate, expected.rate)
