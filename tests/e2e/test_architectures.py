"""At 8 bits every architecture says what it says uncompressed, fused and dequantized."""

from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from sixfold import TurboQuantCache
from sixfold.integrations.transformers.keyword import cache_argument
from tests.e2e.decoding import (
    STEPS,
    batch,
    continue_decoding,
    forward,
    fused_cache,
    relative_error,
    uncompressed_logits,
)
from tests.e2e.models import ARCHITECTURES, fresh_model, tiny_model
from tools.sweep_architectures import architectures, build

TOLERANCE = 0.03
SHORT = 10  # enough to complete a page
NO_WINDOWS = {"sink_tokens": 0, "recent_window": 0}

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


@pytest.mark.usefixtures("unhooked")
@every_architecture
def test_logits_depend_on_the_cache(name: str) -> None:
    """The tolerance means something only if wrong keys miss it by a wide margin."""
    model, data = tiny_model(name), batch(steps=4)
    cache = DynamicCache(config=model.config)
    forward(model, cache, data, 0, data.prompt)
    generator = torch.Generator().manual_seed(2)
    for index in ARCHITECTURES[name].compressed:
        layer = cache.layers[index]
        noise = torch.randn(layer.keys.shape, generator=generator)
        layer.keys = noise * layer.keys.std()
    wrong = continue_decoding(model, cache, data)
    assert relative_error(wrong, uncompressed_logits(name)[:, :4]) > 10 * TOLERANCE


@every_architecture
def test_fused(name: str) -> None:
    cache = fused_cache(name, **NO_WINDOWS)
    dequantized = ARCHITECTURES[name].dequantized
    assert cache.fused == (not dequantized)
    for index in ARCHITECTURES[name].compressed:
        assert cache.layers[index].fused == (index not in dequantized)
    check_decoding(name, cache, STEPS)


@pytest.mark.usefixtures("unhooked")
@every_architecture
def test_fused_with_default_windows(name: str) -> None:
    check_decoding(name, fused_cache(name), SHORT)


# Shape checks more than double the time; test_prefill.py has them on this path.
@pytest.mark.usefixtures("unhooked")
@every_architecture
def test_dequantized(name: str) -> None:
    config = tiny_model(name).config
    cache = TurboQuantCache(config, 8, **NO_WINDOWS)
    assert not cache.fused
    check_decoding(name, cache, STEPS)
    check_decoding(name, TurboQuantCache(config, 8), SHORT)


def check_decoding(name: str, cache: TurboQuantCache, steps: int) -> None:
    """Decode `steps` tokens through `cache` and compare with the uncompressed model."""
    # `for_model` has switched the implementation; `tiny_model` would switch it back.
    fused = any(layer.fused for layer in cache.compressed_layers)
    model, data = tiny_model(name, "sixfold" if fused else "eager"), batch(steps=steps)
    forward(model, cache, data, 0, data.prompt)
    prefilled = tokens_encoded(cache)
    logits = continue_decoding(model, cache, data)
    decoded = tokens_encoded(cache)
    assert tuple(prefilled) == ARCHITECTURES[name].compressed
    assert all(before >= 64 for before in prefilled.values())
    assert all(decoded[index] >= before + 64 for index, before in prefilled.items())
    assert relative_error(logits, uncompressed_logits(name)[:, :steps]) < TOLERANCE
    for layer in cache.compressed_layers:
        if layer.is_sliding:
            assert layer.store.held < layer.sliding_window + 64


def tokens_encoded(cache: TurboQuantCache) -> dict[int, int]:
    """Tokens of every layer that became codes, those that left a sliding window included."""
    stores = {i: getattr(layer, "store", None) for i, layer in enumerate(cache.layers)}
    return {i: s.length - s.window.tokens for i, s in stores.items() if s}


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize("name", ["llama-64", "gemma2", "qwen3"])
@torch.no_grad()
def test_a_model_cut_to_its_first_layers(name: str) -> None:
    """Its config still names the types of those that it had."""
    model, data = fresh_model(name), batch((150, 150), steps=0)
    model.config.num_hidden_layers -= 1
    model.model.layers = model.model.layers[: model.config.num_hidden_layers]
    expected = forward(model, DynamicCache(config=model.config), data, 0, data.prompt)
    for cache in (TurboQuantCache(model.config, 8), TurboQuantCache.for_model(model, 8)):
        assert len(cache.layers) == model.config.num_hidden_layers
        logits = forward(model, cache, data, 0, data.prompt)
        assert relative_error(logits, expected) < TOLERANCE


@pytest.mark.filterwarnings("ignore:.*dequantized for it")
@torch.no_grad()
def test_an_encoder_beside_it_has_heads_of_its_own(tmp_path: Path) -> None:
    name = "ProphetNetForCausalLM"
    model = build(architectures()[name], name, 1.5)
    own, encoder = (
        model.config.num_decoder_attention_heads,
        model.config.num_encoder_attention_heads,
    )
    assert own != encoder
    cache = TurboQuantCache.for_model(model, 8)
    model(torch.randint(3, 90, (1, 100)), **cache_argument(cache))
    cache.save(tmp_path / "cache")
    assert TurboQuantCache.load(tmp_path / "cache", model).get_seq_length() == 100
