"""Every architecture with attention on Triton's kernels, in its interpreter."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from sixfold import TurboQuantCache
from sixfold.kernels import attention, cached_attention
from sixfold.kernels.attention import triton as pages
from sixfold.kernels.cached_attention import triton as layers
from tests.e2e.models import ARCHITECTURES, tiny_model
from tests.e2e.test_architectures import NO_WINDOWS, SHORT, check_decoding

FAST = ("llama-20",)


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize(
    "name",
    [
        name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
        for name in ARCHITECTURES
    ],
)
def test_fused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*arguments: object, **options: object) -> object:
        calls.append(name)
        return layers.cached_attention(*arguments, **options)

    monkeypatch.setattr(attention, "implementation", lambda *_: pages)
    monkeypatch.setattr(cached_attention, "implementation", lambda *_: _Counted(counted))
    check_decoding(name, TurboQuantCache.for_model(tiny_model(name), bits=8, **NO_WINDOWS), SHORT)
    fused = set(ARCHITECTURES[name].compressed) - set(ARCHITECTURES[name].dequantized)
    assert bool(calls) == bool(fused)


class _Counted:
    def __init__(self, cached_attention: object) -> None:
        self.cached_attention = cached_attention
