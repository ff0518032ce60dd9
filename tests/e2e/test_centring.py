"""Centring and equalizing keys: what breaks rotation-only codes costs nothing here.

Every hard model computes what its plain twin computes. By default it may lose little more than the
twin; with centring or equalization switched off it must lose visibly more, or the test is blind.
"""

import functools
import itertools
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel

from benchmarks.hard import with_outlier_channels
from sixfold import TurboQuantCache
from sixfold.cache import code
from sixfold.eval.embedded import haystack, load_embedded
from sixfold.integrations.transformers.keyword import cache_argument
from sixfold.kernels.attention import attention
from sixfold.kernels.types import Past
from tests.e2e.decoding import (
    PROMPTS,
    Batch,
    batch,
    continue_decoding,
    decode,
    forward,
    relative_error,
)
from tests.e2e.models import fresh_model

# Shapes are checked in test_architectures.py; this is about numbers, many of them.
pytestmark = pytest.mark.usefixtures("unhooked")

NO_WINDOWS = {"sink_tokens": 0, "recent_window": 0}
PREFILL, TOKENS = 350, 550
SEEDS = (0, 1)  # rotations: one alone moves the divergence by 20 %

both_modes = pytest.mark.parametrize("fused", [True, False], ids=["fused", "dequantized"])
few_bits = pytest.mark.parametrize("bits", [4, 3])


def make_cache(model: PreTrainedModel, bits: float, fused: bool, **options: Any) -> TurboQuantCache:
    """A cache without windows: every token but the open page is a code."""
    options = {**NO_WINDOWS, **options}
    if fused:
        return TurboQuantCache.for_model(model, bits, **options)
    model.set_attn_implementation("eager")
    return TurboQuantCache(model.config, bits, **options)


# Outlier channels: the trained model, mean KL divergence to itself uncompressed.


@functools.cache
def trained(hard: bool) -> LlamaForCausalLM:
    """The embedded model, or its twin with outlier channels."""
    model = trained(False) if hard else load_embedded()[0].requires_grad_(False)
    return with_outlier_channels(model) if hard else model


@functools.cache
def prose() -> Tensor:
    """Two stretches of English."""
    _, tokenizer = load_embedded()
    return torch.tensor(tokenizer(haystack()[:6000])["input_ids"][: 2 * TOKENS]).view(2, -1)


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, cache: Any) -> Tensor:
    """Of the continuation, whose queries attend to the codes of the beginning."""
    ids = prose()
    model(ids[:, :PREFILL], **cache_argument(cache), use_cache=True, logits_to_keep=1)
    return model(ids[:, PREFILL:], **cache_argument(cache), use_cache=True).logits.log_softmax(-1)


@functools.cache
def uncompressed_log_probabilities(hard: bool) -> Tensor:
    model = trained(hard)
    model.set_attn_implementation("eager")
    return log_probabilities(model, DynamicCache(config=model.config))


@functools.cache
def divergence(hard: bool, bits: float, fused: bool, equalize: bool = True) -> float:
    """Mean KL in nats to the same model uncompressed."""
    model, expected = trained(hard), uncompressed_log_probabilities(hard)
    found = []
    for seed in SEEDS:
        cache = make_cache(model, bits, fused, equalize_keys=equalize, seed=seed)
        actual = log_probabilities(model, cache)
        found.append(float((expected.exp() * (expected - actual)).sum(-1).mean()))
    return statistics.mean(found)


def test_outlier_channels_do_not_change_the_model() -> None:
    plain, hard = uncompressed_log_probabilities(False), uncompressed_log_probabilities(True)
    assert relative_error(hard, plain) < 1e-4


@few_bits
def test_outlier_channels_fused(bits: float) -> None:
    """The queries are seen, so that the result does not depend on who carries the magnitude."""
    plain, hard = (divergence(h, bits, fused=True) for h in (False, True))
    assert hard < 1.5 * plain
    assert divergence(True, bits, fused=True, equalize=False) > 4 * hard


@few_bits
def test_outlier_channels_dequantized(bits: float) -> None:
    """Queries are hidden and keys alone decide: most of the loss goes, not all."""
    plain, hard = (divergence(h, bits, fused=False) for h in (False, True))
    assert hard < 2.7 * plain
    assert divergence(True, bits, fused=True, equalize=False) > 2 * hard


@few_bits
def test_equalization_costs_an_ordinary_model_nothing(bits: float) -> None:
    assert divergence(False, bits, True) < 1.3 * divergence(False, bits, True, equalize=False)


# Constant offsets: models without rotary positions, to which q·b is constant over the softmax.

OFFSET_MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "opt": {},
    "smollm3": {"no_rope_layers": [0, 0], "attention_bias": True},
}


@functools.cache
def offset_model(name: str, size: float) -> PreTrainedModel:
    """A tiny model whose every key carries the same vector, of `size` in each channel."""
    model = fresh_model(name, **OFFSET_MODELS[name])
    generator = torch.Generator().manual_seed(5)
    for path, bias in model.named_parameters():
        if path.endswith("c_attn.bias"):
            bias = bias.chunk(3)[1]  # of queries, keys, values
        elif not path.endswith("k_proj.bias"):
            continue
        bias.add_(size * torch.randn(bias.shape, generator=generator))
    return model


@functools.cache
def offset_logits(name: str, size: float, prompts: tuple[int, ...] = PROMPTS) -> Tensor:
    model = offset_model(name, size)
    model.set_attn_implementation("eager")
    return decode(model, DynamicCache(config=model.config), batch(prompts, steps=8))


@functools.cache
def offset_error(name: str, size: float, bits: float, fused: bool, center: bool) -> float:
    """Relative error of the decoded logits."""
    model, expected = offset_model(name, size), offset_logits(name, size)
    cache = make_cache(model, bits, fused, center_keys=center)
    return relative_error(decode(model, cache, batch(steps=8)), expected)


@pytest.mark.parametrize("name", OFFSET_MODELS)
def test_constant_offset_does_not_change_the_model(name: str) -> None:
    assert relative_error(offset_logits(name, 10.0), offset_logits(name, 0.0)) < 1e-3


@both_modes
@few_bits
@pytest.mark.parametrize("name", OFFSET_MODELS)
def test_constant_offset(name: str, bits: float, fused: bool) -> None:
    plain, hard = (offset_error(name, size, bits, fused, center=True) for size in (0.0, 10.0))
    assert hard < 1.1 * plain
    assert offset_error(name, 10.0, bits, fused, center=False) > 2 * hard


# Absolute logits matter to soft-capping, to sinks, and where codes meet uncentred tokens.

ABSOLUTE_MODELS: dict[str, dict[str, Any]] = {
    "gemma2": {"attention_bias": True, "attn_logit_softcapping": 15.0},
    "gpt-oss": {},
    "gpt2": {},
}


@functools.cache
def absolute_model(name: str) -> PreTrainedModel:
    """A model with a large mean key, where RoPE turns it too slowly to average it out."""
    model = fresh_model(name, **ABSOLUTE_MODELS[name])
    generator = torch.Generator().manual_seed(6)
    for path, bias in model.named_parameters():
        if path.endswith("c_attn.bias"):
            bias.chunk(3)[1].add_(4 * torch.randn(64, generator=generator))
        elif path.endswith("k_proj.bias"):
            heads = bias.view(2, 2, -1)  # [KV heads, halves of the RoPE pairs, pairs]
            slow = heads[:, :, heads.shape[2] // 2 :]
            slow.add_(4 * torch.randn(slow.shape, generator=generator))
    return model


def absolute_error(name: str, data: Batch, **options: Any) -> float:
    model = absolute_model(name)
    model.set_attn_implementation("eager")
    expected = decode(model, DynamicCache(config=model.config), data)
    cache = TurboQuantCache.for_model(model, bits=8, **options)
    logits = decode(model, cache, data)
    means = [layer.store.prefix.key_map.mean.norm(dim=-1) for layer in cache.compressed_layers]
    assert min(float(mean.min()) for mean in means) > 5
    return relative_error(logits, expected)


@pytest.mark.parametrize("options", [{}, NO_WINDOWS], ids=["defaults", "no-windows"])
@pytest.mark.parametrize("name", ABSOLUTE_MODELS)
def test_absolute_logits_are_kept(
    name: str, options: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = batch(steps=12)
    assert absolute_error(name, data, **options) < 0.03

    def without_offset(query: Tensor, tokens: Any, past: Past, *rest: Any) -> Tensor:
        zero = past.key_map._replace(mean=torch.zeros_like(past.key_map.mean))
        centred = Past.of(past.pages, zero, past.start, past.kept)
        return attention(query, tokens, centred, *rest)

    monkeypatch.setattr(code, "attention", without_offset)
    assert absolute_error(name, data, **options) > 0.1


# Estimates from tokens that say little.


@both_modes
@pytest.mark.parametrize("name", ["llama-64", "smollm3"])
def test_prompt_that_begins_with_one_token_repeated(name: str, fused: bool) -> None:
    """Its channels look silent: equalizing by that would ruin every later token."""
    model, data = fresh_model(name), batch((248, 248), steps=8)
    data.ids[:, :90] = 5

    def run(cache: Any) -> Tensor:
        forward(model, cache, data, 0, 80)
        forward(model, cache, data, 80, data.prompt)
        return continue_decoding(model, cache, data)

    expected = run(DynamicCache(config=model.config))
    errors = [
        relative_error(run(make_cache(model, 4, fused, equalize_keys=equalize)), expected)
        for equalize in (True, False)
    ]
    assert errors[0] < 1.1 * errors[1]


@few_bits
def test_sequence_that_begins_late(bits: float) -> None:
    """Its page of padding is encoded with the others' first: it takes their mean for its own."""
    model, data = offset_model("gpt2", 10.0), batch((248, 60), steps=8)
    expected = offset_logits("gpt2", 10.0, (248, 60))[1]

    def error(*ends: int) -> float:
        cache = make_cache(model, bits, fused=True)
        for start, stop in itertools.pairwise((0, *ends, data.prompt)):
            forward(model, cache, data, start, stop)
        return relative_error(continue_decoding(model, cache, data)[1], expected)

    assert error(70, 140) < 1.25 * error()


def test_padding_nobody_mentions_is_left_out_of_the_estimate() -> None:
    """Without the fused attention no mask is seen; a run of one token gives padding away."""
    model, data = fresh_model("llama-64"), batch((248, 60), steps=8)
    expected = decode(model, DynamicCache(config=model.config), data)[1]
    errors = [
        relative_error(decode(model, make_cache(model, 4, fused), data)[1], expected)
        for fused in (False, True)
    ]
    assert errors[0] < 1.25 * errors[1]
