"""Attention of transformers shows its queries to a cache that hands out dense keys."""

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sixfold import TurboQuantCache
from sixfold.cache import CachePolicy, CompressedLayer
from sixfold.eval.embedded import haystack, load_embedded
from sixfold.integrations.transformers.keyword import cache_argument
from sixfold.integrations.transformers.layer import TurboQuantLayer
from tests.e2e.decoding import batch, forward, fused_cache, relative_error
from tests.e2e.models import ARCHITECTURES, fresh_model, tiny_model

pytestmark = pytest.mark.usefixtures("unhooked", "exact_arithmetic")

SHOWN = ["sdpa", "sixfold"]
# What is multiplied with queries is not what is cached (latents), or was cached by another layer.
OTHERWISE = [name for name, x in ARCHITECTURES.items() if x.dequantized]
KEYS = torch.randn(1, 2, 320, 32, generator=torch.Generator().manual_seed(0))


def layers(cache: TurboQuantCache) -> list[TurboQuantLayer]:
    return cache.compressed_layers


def scales(cache: TurboQuantCache) -> list[Tensor]:
    return [x.store.prefix.key_map.scale for x in layers(cache)]


def shown(name: str, attention: str) -> PreTrainedModel:
    model = fresh_model(name)
    if attention == "sdpa" and not model._supports_sdpa:
        pytest.skip("the model has no such attention")
    model.set_attn_implementation(attention)
    return model


@pytest.mark.parametrize("attention", SHOWN)
@pytest.mark.parametrize("name", [x for x in ARCHITECTURES if x not in OTHERWISE])
@pytest.mark.parametrize("chunks", [(248,), (100, 101, 47)], ids=["at-once", "chunked"])
def test_queries_are_those_of_attention_on_codes(
    name: str, attention: str, chunks: tuple[int, ...]
) -> None:
    """Padding left out, heads grouped, whatever the windows, sinks and soft-caps."""
    model, data, start = shown(name, attention), batch(steps=1), 0
    fused = fused_cache(name, fit_tokens=500)
    plain = TurboQuantCache(model.config, 8, fit_tokens=500)
    for count in chunks:
        forward(tiny_model(name, "sixfold"), fused, data, start, start + count)
        forward(model, plain, data, start, start + count)
        start += count
    for layer, expected in zip(layers(plain), layers(fused), strict=True):
        found = layer.store.query_energy.squares
        # What later layers are asked differs by rounding.
        torch.testing.assert_close(found, expected.store.query_energy.squares, rtol=1e-4, atol=0)
        assert torch.equal(layer.store.padding, expected.store.padding)
        assert layer.store.observed == expected.store.observed


@pytest.mark.parametrize("attention", SHOWN)
def test_key_maps_of_a_trained_model_are_those_of_attention_on_codes(attention: str) -> None:
    model, tokenizer = load_embedded()
    ids = tokenizer(haystack(), return_tensors="pt").input_ids[:, :700]
    fused = TurboQuantCache.for_model(model)
    with torch.no_grad():
        model(ids, **cache_argument(fused))
        model.set_attn_implementation(attention)
        plain, dense = TurboQuantCache(model.config), DynamicCache(config=model.config)
        model(ids, **cache_argument(plain))
        model(ids, **cache_argument(dense))
    blind = TurboQuantCache.from_cache(dense, model)
    differences = []
    for found, expected, unseen in zip(*map(scales, (plain, fused, blind)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
        differences.append(float((found - unseen).abs().max()))
    assert max(differences) > 0.1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_nothing_that_a_model_computes_changes(name: str, attention: str) -> None:
    model, data = shown(name, attention), batch(steps=1)
    kinds: set[type] = set()
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, out: kinds.update(map(type, out)))
        for module in model.modules()
        if type(module).__name__.endswith("Attention")
    ]
    found = forward(model, TurboQuantCache(model.config, 8), data, 0, data.prompt)
    for hook in hooks:
        hook.remove()
    dense = DynamicCache(config=model.config)
    assert torch.equal(found, forward(model, dense, data, 0, data.prompt))
    assert type(found) is Tensor
    assert kinds <= {Tensor, type(None)}


def test_attention_of_another_kind_gets_plain_tensors() -> None:
    """A kernel or a compiler behind it may take no others."""
    kinds = []

    def attention(module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        kinds.append(type(key))
        return sdpa_attention_forward(module, query, key, *args, **kwargs)

    AttentionInterface.register("another", attention)
    model, data = fresh_model("llama-64"), batch((200,), steps=1)
    model.set_attn_implementation("another")
    cache = TurboQuantCache(model.config, 8, fit_tokens=0)
    forward(model, cache, data, 0, data.prompt)
    assert kinds == [Tensor] * len(cache)
    assert all(layer.store.history.tokens for layer in layers(cache))


@pytest.mark.parametrize("attention", ["sdpa", "eager", "sixfold"])
def test_layers_that_see_no_queries_do_not_wait_for_them(attention: str) -> None:
    """But the first, which cannot know, until the second has its tokens."""
    model = shown("llama-64", attention)
    cache = TurboQuantCache(model.config, 8, fit_tokens=0)
    for index in range(len(cache)):
        cache.update(KEYS, KEYS, index)
        coded = [layer._store.history.tokens for layer in layers(cache)[: index + 1]]
        assert coded == ([0] if attention != "eager" and index == 0 else [256] * (index + 1))


@pytest.mark.parametrize(
    "look",
    [
        lambda cache: cache.fork(),
        lambda cache: cache.tensors(),
        lambda cache: list(cache),
        lambda cache: cache.crop(-1),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: repr(cache),
    ],
)
def test_whoever_looks_finds_codes(look: Any) -> None:
    config = tiny_model("llama-64", "sdpa").config
    cache = TurboQuantCache(config, 8, fit_tokens=0)
    for index in range(len(cache)):
        cache.update(KEYS, KEYS, index)
    look(cache)
    assert [x._store.history.tokens for x in layers(cache)] == [256] * len(cache)


def test_who_registers_another_function_later_is_watched_too() -> None:
    def own(module: Any, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Any:
        return sdpa_attention_forward(module, query, key, value, **kwargs)

    seen(lambda keys: keys)
    before, known = AttentionInterface()["sdpa"], {"attention_mask": None}
    try:
        AttentionInterface.register("sdpa", own)
        assert seen(lambda x: AttentionInterface()["sdpa"](GROUPED, QUERY, x, x, **known))
    finally:
        AttentionInterface.register("sdpa", before)


def test_eager_layers_wait_for_nothing() -> None:
    cache = TurboQuantCache(tiny_model("llama-64", "eager").config, 8, fit_tokens=0)
    cache.update(KEYS, KEYS, 0)
    assert layers(cache)[0]._store.history.tokens == 256


def test_models_that_show_nothing_wait_once() -> None:
    """Falcon attends by itself."""
    model, data = shown("falcon-grouped", "sdpa"), batch((248,), steps=1)
    cache = TurboQuantCache(model.config, 8, fit_tokens=0)
    forward(model, cache, data, 0, data.prompt)
    assert all(layer._store.history.tokens for layer in layers(cache))


def test_tokens_that_waited_go_as_they_came() -> None:
    model, data = shown("llama-64", "sdpa"), batch((248,), steps=1)
    cache = TurboQuantCache(model.config, 8, fit_tokens=240)
    forward(model, cache, data, 0, 200)
    before = [cache[index][0] for index in range(2)]
    more = torch.randn(1, 2, 48, 64, generator=torch.Generator().manual_seed(2))
    cache.update(more, more, 0)
    assert cache.recover(200) == 200
    for index in range(2):
        assert torch.equal(cache[index][0], before[index])


class Interrupt(BaseException):
    """What a user's key raises."""


def test_a_pass_that_ends_before_its_attention_is_repeated() -> None:
    model, data = shown("llama-64", "sdpa"), batch((248,), steps=2)
    cache = TurboQuantCache(model.config, 8, fit_tokens=200)
    dense = DynamicCache(config=model.config)
    forward(model, cache, data, 0, 100)

    def interrupt(*_: Any, **__: Any) -> None:
        raise Interrupt

    with patch.object(torch.nn.functional, "scaled_dot_product_attention", interrupt):
        with pytest.raises(Interrupt):
            forward(model, cache, data, 100, data.prompt)
    assert cache.recover(100) == 100
    forward(model, dense, data, 0, data.prompt)
    forward(model, cache, data, 100, data.prompt)
    found, exact = (forward(model, x, data, data.prompt, data.prompt + 1) for x in (cache, dense))
    assert relative_error(found, exact) < 0.03


def seen(attend: Callable[[Tensor], Any]) -> bool:
    """Whether attention with the keys of 2 heads counts as one of queries."""
    cache = TurboQuantCache(tiny_model("llama-64", "sdpa").config, 8, fit_tokens=0)
    keys, _ = cache.update(KEYS, KEYS, 0)
    assert type(keys) is Tensor
    attend(keys)
    return layers(cache)[0].mapped


QUERY = torch.randn(1, 4, 320, 32, generator=torch.Generator().manual_seed(1))
GROUPED = SimpleNamespace(num_key_value_groups=2, is_causal=True)


def sdpa(query: Tensor, keys: Tensor, mask: Any = None) -> Any:
    """As a model calls it."""
    known = AttentionInterface().get_interface("sdpa", sdpa_attention_forward)
    return known(GROUPED, query, keys, keys, mask)


def test_queries_are_seen() -> None:
    assert seen(lambda keys: sdpa(QUERY, keys))
    assert seen(lambda keys: sdpa(QUERY, keys, torch.zeros(1, 1, 320, 320)))


@pytest.mark.parametrize(
    "attend",
    [
        lambda keys: QUERY @ keys.repeat_interleave(2, 1).mT,
        lambda keys: sdpa(QUERY, keys.clone()),
        lambda keys: sdpa(QUERY, keys[:, :, :]),
        lambda keys: sdpa(QUERY[:, :, :7], keys),
        lambda keys: sdpa(QUERY, KEYS),
    ],
)
def test_what_is_not_asked_of_these_keys(attend: Callable[[Tensor], Any]) -> None:
    assert not seen(attend)


def test_threads_see_their_own() -> None:
    config = tiny_model("llama-64", "sdpa").config
    caches = [TurboQuantCache(config, 8, fit_tokens=500) for _ in range(2)]
    own, other = (cache.update(KEYS, KEYS, 0)[0] for cache in caches)
    thread = threading.Thread(target=lambda: sdpa(QUERY, other))
    thread.start()
    thread.join()
    sdpa(QUERY, own)
    assert not any(layers(cache)[0]._store.query_energy for cache in caches)
    sdpa(QUERY, other)
    assert layers(caches[1])[0]._store.query_energy is not None


@pytest.mark.parametrize("tokens", [100, 600])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "sixfold"])
def test_what_was_given_may_be_written_to_again(attention: str, tokens: int) -> None:
    model = shown("llama-64", attention)
    make = TurboQuantCache.for_model if attention == "sixfold" else TurboQuantCache
    cache = make(model if attention == "sixfold" else model.config, 8)
    generator, given = torch.Generator().manual_seed(0), []
    buffer = torch.empty(1, 2, tokens, 32)
    for index in range(len(cache)):
        given.append(buffer.normal_(generator=generator).clone())
        cache.update(buffer, buffer, index)
    buffer.zero_()
    for (keys, values), expected in zip((cache[i] for i in range(2)), given, strict=True):
        assert relative_error(keys, expected) < 0.01
        assert relative_error(values, expected) < 0.01
        keys.zero_()
        values.zero_()
    assert relative_error(cache[0][0], given[0]) < 0.01
    assert relative_error(cache.fork()[1][1], given[1]) < 0.01


@pytest.mark.parametrize("tokens", [100, 600])
@pytest.mark.parametrize("skipped", [(), (1,)], ids=["compressed", "skipped"])
def test_what_was_taken_over_may_be_written_to(tokens: int, skipped: tuple[int, ...]) -> None:
    model = shown("llama-64", "sdpa")
    dense = DynamicCache(config=model.config)
    for index in range(2):
        given = KEYS.repeat(1, 1, 2, 2)[:, :, :tokens]
        dense.update(given, given, index)
    cache = TurboQuantCache.from_cache(dense, model, 8, skip_layers=skipped)
    before, fork = cache[1][0], cache.fork()
    for layer in dense.layers:
        layer.keys.zero_()
    fork[1][0].zero_()
    assert torch.equal(cache[1][0], before)
    assert torch.equal(fork[1][0], before)


@pytest.mark.parametrize("graph", [False, True])
def test_what_a_layer_hands_out_may_be_written_to(graph: bool) -> None:
    keys = KEYS.clone().requires_grad_(graph)
    layer = CompressedLayer(keys, keys, CachePolicy(fit_tokens=500))
    layer.append(keys, keys)
    layer.compress()
    with torch.no_grad():
        layer.fork().dequantized()[0].zero_()
        assert torch.equal(layer.dequantized()[0], KEYS)
