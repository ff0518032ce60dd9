"""Attention that is not ours shows its queries to a cache that hands out dense keys."""

import copy
import pickle
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from sixfold import TurboQuantCache
from sixfold.eval.embedded import haystack, load_embedded
from sixfold.integrations.transformers.keyword import cache_argument
from sixfold.integrations.transformers.layer import TurboQuantLayer
from tests.e2e.decoding import batch, forward, fused_cache, relative_error
from tests.e2e.models import ARCHITECTURES, fresh_model, tiny_model
from tests.processes import printed
from tests.versions import traces_models

pytestmark = pytest.mark.usefixtures("unhooked", "exact_arithmetic")

SHOWN = ["sdpa", "eager"]
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
        if attention == "sdpa":
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


@pytest.mark.parametrize("attention", SHOWN)
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


@pytest.mark.parametrize("attention", [*SHOWN, "sixfold"])
def test_layers_that_see_no_queries_wait_one_at_a_time(attention: str) -> None:
    model = fresh_model("llama-64")
    model.set_attn_implementation(attention)
    cache = TurboQuantCache(model.config, 8, fit_tokens=0)
    expected = TurboQuantCache(model.config, 8, fit_tokens=0)
    for index in range(len(cache)):
        cache.update(KEYS, KEYS, index)
        expected.update(KEYS, KEYS, index)
        assert expected.nbytes, "which whoever asks waits for"
        coded = [layer._store.history.tokens for layer in layers(cache)[: index + 1]]
        assert coded == [256] * index + [0]
    assert cache.nbytes == expected.nbytes
    assert [x._store.history.tokens for x in layers(cache)] == [256] * len(cache)


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


def seen(product: Callable[[Tensor], Any]) -> bool:
    """Whether a product with the keys of 4 heads, 2 of them cached, counts as one of queries."""
    cache = TurboQuantCache(tiny_model("llama-64", "sdpa").config, 8, fit_tokens=0)
    keys, _ = cache.update(KEYS, KEYS, 0)
    product(keys)
    return layers(cache)[0].mapped


QUERY = torch.randn(1, 4, 320, 32, generator=torch.Generator().manual_seed(1))
TURNED = torch.randperm(32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "product",
    [
        lambda keys: sdpa(QUERY, keys, keys, enable_gqa=True),
        lambda keys: sdpa(query=QUERY, key=keys.repeat_interleave(2, 1), value=QUERY),
        lambda keys: torch.matmul(QUERY, repeat_kv(keys, 2).transpose(2, 3)),
        lambda keys: KEYS @ keys.permute(0, 1, 3, 2),
        lambda keys: KEYS.bfloat16() @ keys.to(torch.bfloat16).transpose(2, 3),
    ],
)
def test_products_of_queries(product: Callable[[Tensor], Any]) -> None:
    assert seen(product)


@pytest.mark.parametrize(
    "product",
    [
        lambda keys: QUERY[:, :, :7] @ keys.repeat_interleave(2, 1).transpose(2, 3),
        lambda keys: keys @ keys.transpose(2, 3),
        lambda keys: keys @ KEYS.transpose(2, 3),
        lambda keys: sdpa(keys, KEYS, KEYS),
        lambda keys: KEYS[0] @ keys[0].transpose(1, 2),
        # In another order of channels, or of heads, or without some tokens.
        lambda keys: KEYS[..., TURNED] @ keys[..., TURNED].transpose(2, 3),
        lambda keys: QUERY @ keys[:, None].expand(1, 2, 2, 320, 32).reshape(1, 4, 320, 32).mT,
        lambda keys: sdpa(KEYS, keys[:, [1, 0]], KEYS),
        lambda keys: sdpa(KEYS, keys[:, :, 1:], KEYS[:, :, 1:]),
        lambda keys: sdpa(KEYS, 2 * keys, KEYS),
    ],
)
def test_products_that_are_not(product: Callable[[Tensor], Any]) -> None:
    assert not seen(product)


def test_keys_may_be_kept_like_any_tensor() -> None:
    cache = TurboQuantCache(tiny_model("llama-64", "sdpa").config, 8)
    keys, _ = cache.update(KEYS, KEYS, 0)
    for copied in (copy.deepcopy(keys), pickle.loads(pickle.dumps(keys)), keys + 0):
        assert type(copied) is Tensor
        assert torch.equal(copied, KEYS)
    assert torch.equal(torch.nn.Parameter(keys), KEYS)
    assert repr(keys) == repr(KEYS)


def what_a_graph_makes_of_keys() -> float:
    cache = TurboQuantCache(tiny_model("llama-64", "sdpa").config, 8)
    keys, _ = cache.update(KEYS, KEYS, 0)
    found = torch.compile(sdpa, backend="eager", fullgraph=True)(KEYS, keys, KEYS)
    return float((found - sdpa(KEYS, KEYS, KEYS)).abs().max())


@traces_models
def test_a_graph_takes_them() -> None:
    code = "from tests.e2e.test_watched import what_a_graph_makes_of_keys as f; print(f())"
    assert float(printed(code)[-1]) < 1e-6


def test_a_config_that_no_model_was_made_of() -> None:
    """As `AutoConfig` reads it, it does not say who gets the keys."""
    config = type(tiny_model("llama-64").config)(num_hidden_layers=2)
    assert config._attn_implementation is None
    cache = TurboQuantCache(config, 8)
    assert type(cache.update(KEYS, KEYS, 0)[0]) is Tensor


@pytest.mark.parametrize("tokens", [100, 600])
@pytest.mark.parametrize("attention", [*SHOWN, "sixfold"])
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
def test_what_was_taken_over_may_be_written_to(tokens: int) -> None:
    model = shown("llama-64", "sdpa")
    dense = DynamicCache(config=model.config)
    for index in range(2):
        given = KEYS.repeat(1, 1, 2, 2)[:, :, :tokens]
        dense.update(given, given, index)
    cache = TurboQuantCache.from_cache(dense, model, 8)
    before = cache[1][0].clone()
    for layer in dense.layers:
        layer.keys.zero_()
    assert torch.equal(cache[1][0], before)
