"""Chunked prefill, masks of one's own, narrow dtypes, and models used without our cache."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sixfold import TurboQuantCache
from sixfold.integrations.transformers.keyword import cache_argument
from tests.e2e.decoding import (
    Batch,
    batch,
    continue_decoding,
    decode,
    forward,
    relative_error,
    uncompressed_logits,
)
from tests.e2e.models import fresh_model, tiny_model

TOLERANCE = 0.03
NO_WINDOWS = {"sink_tokens": 0, "recent_window": 0}

both_modes = pytest.mark.parametrize("fused", [True, False], ids=["fused", "dequantized"])


def make_cache(model: PreTrainedModel, fused: bool, **options: Any) -> TurboQuantCache:
    """A cache at 8 bits, nothing in full precision beyond the open page."""
    options = {"bits": 8, **NO_WINDOWS, **options}
    if fused:
        return TurboQuantCache.for_model(model, **options)
    return TurboQuantCache(model.config, **options)


@both_modes
@pytest.mark.parametrize("prompts", [(271, 271), (271, 203, 150)], ids=["even", "padded"])
@pytest.mark.parametrize("name", ["llama-64", "mistral", "gemma2", "gpt-oss", "smollm3", "lfm2"])
def test_chunks_say_what_one_pass_says(name: str, prompts: tuple[int, ...], fused: bool) -> None:
    model, data = tiny_model(name), batch(prompts, steps=4)
    once = forward(model, DynamicCache(config=model.config), data, 0, data.ids.shape[1])
    cache = make_cache(model, fused)
    ends = [0, 64, 71, 271]
    chunks = [forward(model, cache, data, *ends[i : i + 2]) for i in range(3)]
    chunks.append(continue_decoding(model, cache, data))
    valid = data.mask.bool()
    assert relative_error(torch.cat(chunks, 1)[valid], once[valid]) < TOLERANCE


@both_modes
@pytest.mark.parametrize("kind", ["boolean", "additive", "bias"])
@pytest.mark.parametrize("name", ["llama-64", "gpt2"])
def test_masks_of_ones_own(name: str, kind: str, fused: bool) -> None:
    """Four axes: a hidden stretch of the prompt, as True and False, as 0 and -inf, or a bias."""
    model, data = tiny_model(name), batch((200, 137), steps=8)
    additive = own_mask(data, kind)
    expected = run_with_mask(model, DynamicCache(config=model.config), data, additive)
    if not fused and kind == "boolean":
        model.set_attn_implementation("sdpa")
    cache = make_cache(model, fused)
    mask = additive == 0 if kind == "boolean" else additive
    assert relative_error(run_with_mask(model, cache, data, mask), expected) < TOLERANCE
    ordinary = forward(model, make_cache(model, fused), data, 0, data.ids.shape[1])
    assert relative_error(ordinary[:, data.prompt :], expected) > 10 * TOLERANCE


def own_mask(data: Batch, kind: str) -> Tensor:
    """An additive mask [batch, heads, tokens, tokens]: causal, padded, and something more."""
    tokens = torch.arange(data.ids.shape[1])
    seen = (tokens <= tokens[:, None]) & data.mask.bool()[:, None, None, :]
    if kind != "bias":
        seen = seen & ~((tokens >= 80) & (tokens < 190) & (tokens[:, None] >= 200))
    lowest = torch.finfo(torch.float32).min
    mask = torch.zeros(seen.shape).masked_fill(~seen, lowest)
    if kind == "bias":
        slopes = torch.tensor([0.0, 0.02, 0.05, 0.5])[:, None, None]
        mask = mask + slopes * (tokens - tokens[:, None]).clamp(max=0)
    return mask


@torch.no_grad()
def run_with_mask(model: PreTrainedModel, cache: Any, data: Batch, mask: Tensor) -> Tensor:
    """Logits of the continuation, the rows of `mask` handed to the model as they are."""
    logits = []
    ends = [0, *range(data.prompt, data.ids.shape[1] + 1)]
    for start, stop in itertools.pairwise(ends):
        out = model(
            data.ids[:, start:stop],
            attention_mask=mask[:, :, start:stop, :stop],
            position_ids=data.positions[:, start:stop],
            **cache_argument(cache),
        )
        logits.append(out.logits)
    return torch.cat(logits[1:], 1)


@pytest.mark.filterwarnings("ignore:.*dequantized for it")
@both_modes
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama-128", torch.bfloat16),
        ("llama-128", torch.float16),
        ("gemma3", torch.bfloat16),
        ("gpt-oss", torch.bfloat16),
        ("gpt-oss", torch.float16),
        ("deepseek-v3", torch.bfloat16),
        ("lfm2", torch.bfloat16),
    ],
)
def test_narrow_dtypes(name: str, dtype: torch.dtype, fused: bool) -> None:
    model, data = fresh_model(name).to(dtype), batch(steps=10)
    expected = decode(model, DynamicCache(config=model.config), data)
    rounding = relative_error(expected, uncompressed_logits(name)[:, :10])
    logits = decode(model, make_cache(model, fused), data)
    assert logits.dtype == dtype
    assert relative_error(logits, expected) < TOLERANCE + rounding


@pytest.mark.parametrize("name", ["llama-80", "mistral", "gpt2", "olmo2", "lfm2"])
def test_other_caches_are_not_touched(name: str) -> None:
    model, data = tiny_model(name, "sdpa"), batch(steps=4)

    def outputs() -> tuple[Tensor, Tensor]:
        cached = decode(model, DynamicCache(config=model.config), data)
        with torch.no_grad():
            uncached = model(data.ids, attention_mask=data.mask, use_cache=False).logits
        return cached, uncached

    before = outputs()
    TurboQuantCache.for_model(model)
    assert model.config._attn_implementation == "sixfold"
    for ours, theirs in zip(outputs(), before, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["gemma2", "gpt-oss", "mimo-v2"])
def test_other_caches_where_pytorch_has_no_kernel(name: str) -> None:
    """Soft-capping and sinks go through our own exact attention."""
    model, data = tiny_model(name), batch()
    TurboQuantCache.for_model(model)
    logits = decode(model, DynamicCache(config=model.config), data)
    assert relative_error(logits, uncompressed_logits(name)) < 1e-5


@pytest.mark.parametrize("name", ["llama-64", "mistral", "lfm2", "falcon-grouped", "falcon-alibi"])
def test_dequantized_under_sdpa(name: str) -> None:
    """Against the same attention: Falcon's two ways to add ALiBi differ by a tenth."""
    model, data = fresh_model(name, attn_implementation="sdpa"), batch()
    expected = decode(model, DynamicCache(config=model.config), data)
    logits = decode(model, make_cache(model, fused=False), data)
    assert relative_error(logits, expected) < TOLERANCE
