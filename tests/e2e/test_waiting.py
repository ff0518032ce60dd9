"""A cache waits until it has the tokens to fit good key maps to, and loses nothing meanwhile."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from sixfold import TurboQuantCache
from sixfold.cache import cache_nbytes
from sixfold.errors import SixfoldError
from sixfold.integrations.transformers.config import uncompressed_shapes
from tests.e2e.decoding import Batch, batch, forward, relative_error
from tests.e2e.models import fresh_model

pytestmark = pytest.mark.usefixtures("unhooked", "exact_arithmetic")

ENOUGH = 230
SHORT = 150

both_modes = pytest.mark.parametrize("fused", [True, False], ids=["fused", "dequantized"])


def waiting(model: PreTrainedModel, fused: bool = True, **options: Any) -> TurboQuantCache:
    options = {"bits": 8, "recent_window": 0, "fit_tokens": ENOUGH, **options}
    if fused:
        return TurboQuantCache.for_model(model, **options)
    model.set_attn_implementation("eager")
    return TurboQuantCache(model.config, **options)


def coded(cache: TurboQuantCache) -> list[int]:
    """Tokens of every layer that are codes."""
    return [layer.store.history.tokens if layer.store else 0 for layer in cache.compressed_layers]


def prefilled(cache: TurboQuantCache, model: PreTrainedModel, data: Batch) -> TurboQuantCache:
    forward(model, cache, data, 0, data.prompt)
    return cache


@pytest.mark.waiting
def test_what_the_default_is() -> None:
    cache = TurboQuantCache.for_model(fresh_model("llama-64"))
    assert [layer.policy.fit_tokens for layer in cache.compressed_layers] == [512, 512]


@both_modes
@pytest.mark.parametrize("name", ["llama-64", "mistral", "gemma2"])
def test_nothing_is_lost_until_there_are_enough(name: str, fused: bool) -> None:
    model, data = fresh_model(name), batch((248, 203))
    cache = waiting(model, fused)
    forward(model, cache, data, 0, SHORT)
    exact = DynamicCache(config=model.config)
    plain = fresh_model(name)
    plain.set_attn_implementation("eager")
    forward(plain, exact, data, 0, SHORT)
    for token in range(SHORT, data.prompt):
        found = forward(model, cache, data, token, token + 1)
        expected = forward(plain, exact, data, token, token + 1)
        waits = token + 1 < ENOUGH
        assert all((n == 0) == waits for n in coded(cache))
        # The pass that completes them is the last that is exact.
        assert relative_error(found, expected) < (1e-5 if token < ENOUGH else 0.1)


def test_the_map_is_that_of_all_of_them() -> None:
    """As if they had come in one piece: in the first layer, whose keys no code has changed."""
    model, data = fresh_model("llama-64"), batch((248, 248))
    slowly, at_once = waiting(model), waiting(model, fit_tokens=0)
    forward(model, slowly, data, 0, SHORT)
    for token in range(SHORT, ENOUGH):
        forward(model, slowly, data, token, token + 1)
    forward(model, at_once, data, 0, ENOUGH)
    pools = []
    for cache in (slowly, at_once):
        store = cache.compressed_layers[0].store
        assert store is not None
        (run,) = store.history.runs
        pools.append(run.slab.pool.key_codes[run.slots])
    assert torch.equal(*pools)


def test_the_longest_sequence_decides() -> None:
    model, data = fresh_model("llama-64"), batch((248, 40))
    assert coded(prefilled(waiting(model), model, data)) == [192, 192]


def test_given_maps_and_none_wait_for_nothing() -> None:
    model, data = fresh_model("llama-64"), batch((SHORT, SHORT))
    assert coded(prefilled(waiting(model), model, data)) == [0, 0]
    maps = prefilled(waiting(model, fit_tokens=0), model, data).key_maps()
    assert coded(prefilled(waiting(model, key_map=maps), model, data)) == [128, 128]
    nothing = {"center_keys": False, "equalize_keys": False}
    assert coded(prefilled(waiting(model, **nothing), model, data)) == [128, 128]


def test_a_static_cache_is_made_of_codes_all_the_same() -> None:
    model, data = fresh_model("llama-64"), batch((SHORT, SHORT))
    cache = prefilled(waiting(model), model, data)
    static = cache.static(300)
    assert [int(layer.static.coded) for layer in static.layers] == [128, 128]
    assert coded(cache) == [0, 0]
    fewest = prefilled(waiting(model), model, batch((40, 40)))
    with pytest.raises(SixfoldError, match="40 tokens are still too few"):
        fewest.static(300)


@pytest.mark.parametrize("way", ["file", "fork", "from_cache"])
def test_a_copy_waits_on(way: str, tmp_path: Path) -> None:
    model, data = fresh_model("llama-64"), batch((SHORT, SHORT), steps=24)
    cache = prefilled(waiting(model, fit_tokens=160), model, data)
    if way == "file":
        cache.save(tmp_path / "file")
        copy = TurboQuantCache.load(tmp_path / "file", model)
    elif way == "fork":
        copy = cache.fork()
    else:
        source = DynamicCache(config=model.config)
        forward(model, source, data, 0, SHORT)
        copy = TurboQuantCache.from_cache(source, model, 8, recent_window=0, fit_tokens=160)
    for token in range(SHORT, 165):
        assert coded(copy) == ([0, 0] if token < 160 else [128, 128])
        forward(model, copy, data, token, token + 1)


def test_their_bytes_are_known_in_advance() -> None:
    model = fresh_model("llama-64")
    for tokens in (SHORT, ENOUGH - 1, ENOUGH, 248):
        cache = waiting(model)
        forward(model, cache, batch((tokens, tokens), steps=0), 0, tokens)
        policy = cache.compressed_layers[0].policy
        shapes = [dataclasses.replace(x, policy=policy) for x in uncompressed_shapes(model.config)]
        assert cache.nbytes == cache_nbytes(shapes, tokens=tokens, batch=2, element_size=4)
