"""What any attention has prefilled, compressed: `TurboQuantCache.from_cache`."""

import math
from typing import Any

import pytest
import torch
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel, StaticCache

from sixfold import TurboQuantCache
from sixfold.errors import ShapeError, SixfoldError
from tests.e2e.decoding import (
    Batch,
    batch,
    continue_decoding,
    expected_warning,
    forward,
    relative_error,
)
from tests.e2e.models import fresh_model

pytestmark = pytest.mark.usefixtures("unhooked")

TOLERANCE = 0.03
STEPS = 12
# Full, sliding, capped, shared between layers, latent, with states, attended in the model's code.
NAMES = ["llama-64", "mistral", "gemma2", "gemma4", "deepseek-v3", "qwen3-next", "lfm2", "gpt-oss"]


def prefilled(model: PreTrainedModel, data: Batch) -> DynamicCache:
    model.set_attn_implementation("eager")
    source = DynamicCache(config=model.config)
    forward(model, source, data, 0, data.prompt)
    return source


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_decoding_goes_on(name: str, padded: bool) -> None:
    model = fresh_model(name)
    data = batch(*[] if padded else [(248, 248)], steps=STEPS)
    source = prefilled(model, data)
    mask = data.mask[:, : data.prompt] if padded else None
    options: dict[str, Any] = {"bits": 8, "recent_window": 0, "attention_mask": mask}
    with expected_warning(name):
        cache = TurboQuantCache.from_cache(source, model, **options)
    assert cache.get_seq_length() == data.prompt
    assert all(layer.store.history.tokens >= 64 for layer in cache.compressed_layers)
    logits = continue_decoding(model, cache, data)
    model.set_attn_implementation("eager")
    # The source was left as it was.
    expected = continue_decoding(model, source, data)
    assert relative_error(logits, expected) < TOLERANCE


def test_padding_is_no_token() -> None:
    """With the mask, sinks and key map are those of the same sequence without padding."""
    model, data = fresh_model("llama-64"), batch((248, 150), steps=0)
    source = prefilled(model, data)
    cache = TurboQuantCache.from_cache(source, model, attention_mask=data.mask)
    source.batch_select_indices(torch.tensor([1]))
    for layer in source.layers:
        layer.keys, layer.values = layer.keys[:, :, -150:], layer.values[:, :, -150:]
    alone = TurboQuantCache.from_cache(source, model)
    for ours, theirs in zip(cache.compressed_layers, alone.compressed_layers, strict=True):
        ours, theirs = ours.store.prefix, theirs.store.prefix
        assert torch.equal(ours.sinks.keys[1], theirs.sinks.keys[0])
        torch.testing.assert_close(ours.key_map.mean[1], theirs.key_map.mean[0])
        torch.testing.assert_close(ours.key_map.scale[1], theirs.key_map.scale[0])


def test_it_is_as_small_and_shares_nothing_that_changes() -> None:
    model, data = fresh_model("llama-64"), batch((248, 248), steps=STEPS)
    source = prefilled(model, data)
    held = [layer.keys.clone() for layer in source.layers]
    cache = TurboQuantCache.from_cache(source, model, bits=4)
    twin = TurboQuantCache.for_model(model, bits=4)
    forward(model, twin, data, 0, data.prompt)
    assert cache.nbytes == twin.nbytes
    continue_decoding(model, cache, data)
    for layer, keys in zip(source.layers, held, strict=True):
        assert torch.equal(layer.keys, keys)


def test_few_tokens_and_none() -> None:
    model, data = fresh_model("llama-64"), batch((9,), steps=STEPS)
    source = prefilled(model, data)
    for cache, first in (
        (TurboQuantCache.from_cache(source, model), data.prompt),
        (TurboQuantCache.from_cache(DynamicCache(config=model.config), model), 0),
    ):
        assert cache.get_seq_length() == first
        forward(model, cache, data, first, data.prompt + 1)
        assert cache.get_seq_length() == data.prompt + 1


def test_an_interrupted_source_is_refused() -> None:
    model, data = fresh_model("llama-64"), batch(steps=0)
    source = prefilled(model, data)
    source.layers[-1].crop(-5)
    with pytest.raises(SixfoldError, match="interrupted"):
        TurboQuantCache.from_cache(source, model)


def test_what_cannot_be_read_says_so() -> None:
    model, data = fresh_model("llama-64"), batch((20, 20), steps=0)
    source = prefilled(model, data)

    def refused(match: str, source: Any = source, **options: Any) -> None:
        with pytest.raises(SixfoldError, match=match):
            TurboQuantCache.from_cache(source, model, **options)

    refused("got tuple", source=())
    refused("got EncoderDecoderCache", EncoderDecoderCache(source, source))
    refused("layers, got one of 0", DynamicCache())
    refused("got a StaticLayer", StaticCache(model.config, max_cache_len=40))
    refused("got a TurboQuantLayer", source=TurboQuantCache(model.config))
    tokens = torch.zeros(2, 2, 20, 64)
    for other, match in (
        (tokens[:, [0, 1, 1]], r"\(2, 64, 64\), got \(3, 64, 64\): another model"),
        (tokens[..., :32], r"\(2, 64, 64\), got \(2, 32, 32\): another model"),
        (tokens[:1], r"the same sequences, got \[2, 1\]"),
        (tokens.to("meta"), "layer 1 holds tokens on the meta device"),
    ):
        wrong = DynamicCache(config=model.config)
        wrong.update(tokens, tokens, 0)
        wrong.update(other, other, 1)
        refused(match, wrong)
    with pytest.raises(ShapeError, match=r"expected \[2, 20\].*got \[2, 19\]"):
        TurboQuantCache.from_cache(source, model, attention_mask=data.mask[:, 1:])
    numbers = torch.ones(2, 20)
    numbers[1, :5] = 0
    for mask in ((1 - numbers) * torch.finfo(torch.float32).min, numbers / 2, numbers * math.nan):
        refused("expected 1 for every token and 0 for padding", attention_mask=mask)
    assert isinstance(source, Cache)
