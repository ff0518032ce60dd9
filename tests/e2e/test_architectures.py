"""At 8 bits every architecture says what it says uncompressed, fused and dequantized."""

import pytest
import torch
from transformers import DynamicCache

from sixfold import TurboQuantCache
from tests.e2e.decoding import (
    STEPS,
    batch,
    continue_decoding,
    forward,
    fused_cache,
    relative_error,
    uncompressed_logits,
)
from tests.e2e.models import ARCHITECTURES, tiny_model

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
