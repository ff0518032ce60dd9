"""Layers treated differently: left alone, at other bit widths, with other windows."""

from typing import Any

import pytest
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from sixfold import TurboQuantCache
from sixfold.cache import CachePolicy, cache_nbytes
from sixfold.integrations.transformers import layer_shapes
from sixfold.integrations.transformers.config import coded_dims
from sixfold.integrations.transformers.layers import layer_policies
from tests.e2e.decoding import (
    batch,
    decode,
    forward,
    fused_cache,
    relative_error,
    uncompressed_logits,
)
from tests.e2e.models import ARCHITECTURES, tiny_model

# Shapes are checked in test_architectures.py.
pytestmark = pytest.mark.usefixtures("unhooked")

TOLERANCE = 0.03
STEPS = 12

both_modes = pytest.mark.parametrize("fused", [True, False], ids=["fused", "dequantized"])


def make_cache(name: str, fused: bool, bits: float = 8, **options: Any) -> TurboQuantCache:
    """A cache for the tiny model called `name`, which is set to the attention it needs."""
    model = tiny_model(name)
    if fused:
        return fused_cache(name, bits, **options)
    return TurboQuantCache(model.config, bits, **options)


def error(name: str, cache: TurboQuantCache) -> float:
    """Relative error of the decoded logits."""
    model = tiny_model(name, "sixfold" if cache.fused else "eager")
    logits = decode(model, cache, batch(steps=STEPS))
    return relative_error(logits, uncompressed_logits(name)[:, :STEPS])


@both_modes
@pytest.mark.parametrize("skip", [0, 1, -1])
@pytest.mark.parametrize("name", ["llama-64", "mistral", "gpt-oss"])
def test_skipped_layer_stays_uncompressed(name: str, skip: int, fused: bool) -> None:
    cache = make_cache(name, fused, sink_tokens=0, recent_window=0, skip_layers=[skip])
    assert error(name, cache) < TOLERANCE
    assert isinstance(cache.layers[skip], DynamicLayer)
    assert [layer.store.history.tokens > 0 for layer in cache.compressed_layers] == [True]


@both_modes
@pytest.mark.parametrize("name", ["llama-64", "mistral", "gemma2"])
def test_layers_with_policies_of_their_own(name: str, fused: bool) -> None:
    per_layer = {0: {"value_bits": 7, "recent_window": 16}, -1: {"key_bits": 7, "sink_tokens": 9}}
    cache = make_cache(name, fused, recent_window=0, per_layer=per_layer)
    first, last = (layer.policy for layer in cache.compressed_layers)
    assert first == CachePolicy(key_bits=8, value_bits=7, recent_window=16)
    assert last == CachePolicy(key_bits=7, value_bits=8, recent_window=0, sink_tokens=9)
    assert error(name, cache) < TOLERANCE


@both_modes
def test_fewer_bits_say_less(fused: bool) -> None:
    errors = [error("llama-64", make_cache("llama-64", fused, bits)) for bits in (2, 3.5, 6)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_key_and_value_bits_are_separate() -> None:
    def with_bits(**bits: float) -> float:
        return error("llama-64", make_cache("llama-64", True, **bits))

    assert with_bits(key_bits=2) > 5 * with_bits()
    assert with_bits(value_bits=2) > 5 * with_bits()


@pytest.mark.parametrize(
    ("name", "other"), [("qwen3-next", LinearAttentionLayer), ("lfm2", LinearAttentionLayer)]
)
def test_layers_without_softmax_attention_stay_as_they_are(name: str, other: type) -> None:
    cache = make_cache(name, fused=True)
    assert [type(layer) is other for layer in cache.layers] == [
        index not in ARCHITECTURES[name].compressed for index in range(len(cache.layers))
    ]


# MiMo doubles the KV heads of sliding layers, which no field of its config says.
@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n != "mimo-v2"])
def test_bytes_are_known_from_the_config_alone(name: str) -> None:
    model = tiny_model(name)
    cache, data = fused_cache(name, 3), batch(steps=0)
    forward(model, cache, data, 0, data.prompt)
    held = sum(
        {
            id(x): x.nbytes for layer in cache.compressed_layers for x in layer.store.tensors()
        }.values()
    )
    policy = CachePolicy.spending(3, coded_dims(model.config))
    policies = layer_policies(len(cache.layers), policy, (), {})
    shapes = layer_shapes(model.config, policies)
    rows = len(data.ids)
    assert cache_nbytes(shapes, tokens=data.prompt, batch=rows, element_size=4) == held
