"""Every architecture with the whole cache on Triton's kernels, in its interpreter."""

import pytest

pytest.importorskip("sixfold.kernels._triton", exc_type=ImportError)

from sixfold import TurboQuantCache
from sixfold.kernels.attention import triton as layers
from sixfold.kernels.encode import triton as encoding
from tests.e2e.models import ARCHITECTURES, tiny_model
from tests.e2e.test_architectures import NO_WINDOWS, SHORT, check_decoding

# The cheapest that slides; the others take half a minute each, and more.
FAST = ("mistral",)


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize(
    "name",
    [
        name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
        for name in ARCHITECTURES
    ],
)
def test_fused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"attend": 0, "store": 0}
    attend, store = layers.attention, encoding.store_pages

    def attending(*arguments: object, **options: object) -> object:
        calls["attend"] += 1
        return attend(*arguments, **options)

    def storing(*arguments: object) -> None:
        calls["store"] += 1
        store(*arguments)

    monkeypatch.setenv("SIXFOLD_BACKEND", "triton")
    monkeypatch.setattr(layers, "attention", attending)
    monkeypatch.setattr(encoding, "store_pages", storing)
    check_decoding(name, TurboQuantCache.for_model(tiny_model(name), bits=8, **NO_WINDOWS), SHORT)
    fused = set(ARCHITECTURES[name].compressed) - set(ARCHITECTURES[name].dequantized)
    assert bool(calls["attend"]) == bool(fused)
    assert calls["store"]
