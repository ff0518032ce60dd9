"""A forward pass that stops between layers: the cache refuses to go on wrongly, and recovers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sixfold import TurboQuantCache
from sixfold.errors import SixfoldError
from sixfold.integrations.transformers.keyword import cache_argument
from tests.e2e.decoding import batch, continue_decoding, forward, relative_error
from tests.e2e.models import WINDOW, fresh_model

pytestmark = pytest.mark.usefixtures("unhooked", "exact_arithmetic")

SEEN = 200

both_modes = pytest.mark.parametrize("fused", [True, False], ids=["fused", "dequantized"])


class Stopped(Exception):
    """What interrupts: a signal, a lack of memory, somebody's hook."""


def cache_for(model: PreTrainedModel, fused: bool, **options: Any) -> TurboQuantCache:
    if fused:
        return TurboQuantCache.for_model(model, bits=8, **options)
    model.set_attn_implementation("eager")
    return TurboQuantCache(model.config, bits=8, **options)


def interrupted(model: PreTrainedModel, layer: int, *run: Any) -> None:
    """A forward pass that `layer` never begins."""

    def stop(*_: Any) -> None:
        raise Stopped

    hook = model.model.layers[layer].register_forward_pre_hook(stop)
    with pytest.raises(Stopped):
        forward(model, *run)
    hook.remove()


def lengths(cache: TurboQuantCache) -> list[int]:
    return [layer.get_seq_length() for layer in cache.layers]


@both_modes
@pytest.mark.parametrize("name", ["llama-64", "mistral", "gemma2"])
@pytest.mark.parametrize("mask", [True, False])
def test_a_repeated_pass_is_refused_until_recovered(name: str, fused: bool, mask: bool) -> None:
    model, data = fresh_model(name), batch((248, 203) if mask else (248, 248), steps=6)
    cache = cache_for(model, fused)
    cache.activate_past_recording()
    forward(model, cache, data, 0, SEEN)
    untouched = cache.fork()
    interrupted(model, 1, cache, data, SEEN, data.prompt)
    assert lengths(cache) == [data.prompt, SEEN]
    with pytest.raises(SixfoldError, match=r"interrupted.*cache\.recover\(\)"):
        forward(model, cache, data, data.prompt, data.prompt + 1)
    # Nothing was added by the attempt, so that it can be told from what came before.
    assert lengths(cache) == [data.prompt, SEEN]
    assert cache.recover() == SEEN
    assert lengths(cache) == [SEEN, SEEN]
    assert cache.recover() == SEEN
    logits, expected = [], []
    for kept, out in ((cache, logits), (untouched, expected)):
        out += [forward(model, kept, data, SEEN, data.prompt), continue_decoding(model, kept, data)]
    assert relative_error(torch.cat(logits, 1), torch.cat(expected, 1)) < 1e-3


@both_modes
def test_an_interrupted_first_pass(fused: bool) -> None:
    model, data = fresh_model("llama-64"), batch(steps=6)
    cache = cache_for(model, fused)
    interrupted(model, 1, cache, data, 0, data.prompt)
    with pytest.raises(SixfoldError, match="layer 1 holds 0 tokens where others held 248"):
        forward(model, cache, data, data.prompt, data.prompt + 1)
    assert cache.recover() == 0
    forward(model, cache, data, 0, data.prompt)
    twin = cache_for(model, fused)
    forward(model, twin, data, 0, data.prompt)
    expected = continue_decoding(model, twin, data)
    assert relative_error(continue_decoding(model, cache, data), expected) < 1e-5


@both_modes
def test_recovery_that_would_lose_tokens_is_refused(fused: bool) -> None:
    model, data = fresh_model("mistral"), batch((248, 248), steps=6)
    cache = cache_for(model, fused, recent_window=0)
    assert data.prompt > WINDOW + 1
    forward(model, cache, data, 0, 100)
    interrupted(model, 1, cache, data, 100, data.prompt)
    before = lengths(cache)
    with pytest.raises(SixfoldError, match="has let go of"):
        cache.recover()
    assert lengths(cache) == before
    cache.reset()
    forward(model, cache, data, 0, data.prompt)
    assert lengths(cache) == [data.prompt] * 2


@both_modes
def test_layers_kept_uncompressed_count(fused: bool) -> None:
    model, data = fresh_model("llama-64"), batch(steps=0)
    cache = cache_for(model, fused, skip_layers=[0])
    forward(model, cache, data, 0, SEEN)
    interrupted(model, 1, cache, data, SEEN, data.prompt)
    with pytest.raises(SixfoldError, match="interrupted"):
        forward(model, cache, data, SEEN, data.prompt)
    assert cache.recover() == SEEN
    forward(model, cache, data, SEEN, data.prompt)
    assert lengths(cache) == [data.prompt] * 2


@both_modes
@pytest.mark.parametrize(("name", "layer"), [("lfm2", 1), ("lfm2", 2), ("qwen3-next", 1)])
@pytest.mark.parametrize("seen", [0, SEEN])
def test_states_that_cannot_go_back(name: str, layer: int, seen: int, fused: bool) -> None:
    """Also where no layer that counts tokens has been reached."""
    model, data = fresh_model(name), batch((248, 248), steps=0)
    cache = cache_for(model, fused)
    if seen:
        forward(model, cache, data, 0, seen)
    interrupted(model, layer, cache, data, seen, data.prompt)
    with pytest.raises(SixfoldError, match="interrupted"):
        forward(model, cache, data, seen, data.prompt)
    if seen:
        with pytest.raises(SixfoldError, match="reset the cache"):
            cache.recover()
        cache.reset()
    else:
        assert cache.recover() == 0
    again, fresh = forward(model, cache, data, 0, 248), cache_for(model, fused)
    assert torch.equal(again, forward(model, fresh, data, 0, 248))


@both_modes
@pytest.mark.parametrize("name", ["lfm2", "qwen3-next", "llama-64"])
def test_an_interrupted_pass_is_not_saved(name: str, fused: bool, tmp_path: Path) -> None:
    """A file would not say how far it has come."""
    model, data = fresh_model(name), batch((248, 248), steps=0)
    cache = cache_for(model, fused)
    forward(model, cache, data, 0, SEEN)
    cache.save(tmp_path / "whole")
    interrupted(model, 1, cache, data, SEEN, data.prompt)
    with pytest.raises(SixfoldError, match="interrupted"):
        cache.save(tmp_path / "part")
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_an_interrupted_pass_gives_no_static_cache() -> None:
    model, data = fresh_model("llama-64"), batch((248, 248), steps=0)
    cache = cache_for(model, fused=True)
    forward(model, cache, data, 0, SEEN)
    interrupted(model, 1, cache, data, SEEN, data.prompt)
    with pytest.raises(SixfoldError, match=r"interrupted.*cache\.recover\(\)"):
        cache.static(400)
    cache.recover()
    assert cache.static(400).compressed_layers


def test_a_static_cache_says_that_it_computes_no_gradients() -> None:
    model, data = fresh_model("llama-64"), batch((248, 248), steps=2)
    cache = cache_for(model, fused=True)
    forward(model, cache, data, 0, SEEN)
    static = cache.static(400)
    model.requires_grad_(True)
    logits = model(data.ids[:, SEEN : SEEN + 1], **cache_argument(static)).logits
    with pytest.raises(SixfoldError, match="a static cache computes no gradients"):
        logits.sum().backward()


@torch.no_grad()
def test_a_static_cache_of_tokens_that_were_never_attended() -> None:
    """Given to `update` by hand, they are compressed when a static cache is made of them."""
    cache = cache_for(fresh_model("llama-64"), fused=True)
    for layer in range(2):
        cache.update(*random_tokens(SEEN, layer), layer)
    static = cache.static(400)
    assert [int(layer.static.coded) for layer in static.layers] == [128, 128]
    assert [layer.store.history.tokens for layer in cache.compressed_layers] == [0, 0]


@torch.no_grad()
def test_a_static_cache_after_an_interrupted_step() -> None:
    model, data = fresh_model("llama-64"), batch((248, 248), steps=6)
    growing = cache_for(model, True)
    forward(model, growing, data, 0, data.prompt)
    cache = growing.static(300)
    forward(model, cache, data, 248, 249)
    interrupted(model, 1, cache, data, 249, 250)
    with pytest.raises(SixfoldError, match="has not reached all layers"):
        forward(model, cache, data, 249, 250)


@both_modes
def test_early_exit(fused: bool) -> None:
    """A model that uses its first layers only leaves the others empty, and may go on so."""
    model, data = fresh_model("llama-64"), batch(steps=6)
    model.model.config.num_hidden_layers = 1
    cache, layers = cache_for(fresh_model("llama-64"), fused), model.model.layers
    if fused:
        model.set_attn_implementation("sixfold")
    model.model.layers = layers[:1]
    forward(model, cache, data, 0, data.prompt)
    continue_decoding(model, cache, data)
    assert lengths(cache) == [data.prompt + 6, 0]


# ---------------------------------------------------------------- filled by hand


def random_tokens(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 1, 2, count, 64, generator=generator)
    return keys, values


@both_modes
def test_update_stores(fused: bool) -> None:
    """Outside attention too: filling a cache by hand loses no token."""
    model = fresh_model("llama-64")
    cache = cache_for(model, fused)
    parts = [[random_tokens(count, seed) for seed in (0, 1)] for count in (100, 70)]
    for part in parts:
        for index, (keys, values) in enumerate(part):
            cache.update(keys, values, index)
    assert lengths(cache) == [170, 170]
    for index, layer in enumerate(cache.layers):
        keys, values = layer.store.dequantized()
        expected = [torch.cat([part[index][side] for part in parts], 2) for side in (0, 1)]
        assert relative_error(keys, expected[0]) < 0.01
        assert relative_error(values, expected[1]) < 0.01


@both_modes
def test_layers_filled_unevenly_are_not_attended(fused: bool) -> None:
    model, data = fresh_model("llama-64"), batch((100,), steps=0)
    cache = cache_for(model, fused)
    cache.update(*random_tokens(50, 0), 1)
    with pytest.raises(SixfoldError, match=r"cache\.recover"):
        forward(model, cache, data, 0, 100)
