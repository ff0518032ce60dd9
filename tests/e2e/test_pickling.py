"""Caches in other processes: copied, with nothing shared and nothing referred to."""

import copy
import io
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sixfold import TurboQuantCache
from sixfold.errors import SixfoldError
from sixfold.integrations.transformers import cache_argument
from tests.e2e.decoding import batch, continue_decoding, forward
from tests.e2e.models import fresh_model, tiny_model
from tests.processes import printed

pytestmark = pytest.mark.usefixtures("unhooked", "exact_arithmetic")

STEPS = 6


def by_pickle(cache: TurboQuantCache) -> TurboQuantCache:
    return pickle.loads(pickle.dumps(cache))


def by_torch(cache: TurboQuantCache) -> TurboQuantCache:
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def codes(layer: Any) -> list[Tensor]:
    return layer.store.history.tensors() if layer.store else []


def filled(name: str, fused: bool, tokens: int = 248, **options: Any) -> TurboQuantCache:
    model = tiny_model(name, "sixfold" if fused else "eager")
    make = TurboQuantCache.for_model if fused else lambda m, **o: TurboQuantCache(m.config, **o)
    cache = make(model, bits=4, **options)
    if tokens:
        forward(model, cache, batch(steps=STEPS), 0, tokens)
    return cache


@pytest.mark.parametrize("copied", [by_pickle, by_torch])
@pytest.mark.parametrize("tokens", [0, 20, 248])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "dequantized"])
@pytest.mark.parametrize("name", ["llama-64", "mistral", "qwen3-next"])
def test_a_copy_continues_alike(name: str, fused: bool, tokens: int, copied: Any) -> None:
    cache, data = filled(name, fused, tokens), batch(steps=STEPS)
    twin = copied(cache)
    # Pages, which are written in place, are not shared.
    pages = {x.data_ptr() for layer in cache.compressed_layers for x in codes(layer)}
    assert pages.isdisjoint(x.data_ptr() for layer in twin.compressed_layers for x in codes(layer))
    model = tiny_model(name, "sixfold" if fused else "eager")
    if tokens < data.prompt:
        for kept in (cache, twin):
            forward(model, kept, data, tokens, data.prompt)
    expected = continue_decoding(model, cache, data)
    assert torch.equal(continue_decoding(model, twin, data), expected)


def test_a_fork_is_copied_without_its_relatives() -> None:
    cache = filled("llama-64", True)
    forks = [copy.deepcopy(cache) for _ in range(3)]
    alone = len(pickle.dumps(cache))
    del forks[1:]
    assert len(pickle.dumps(forks[0])) == alone


def in_another_process(cache: TurboQuantCache, queue: Any) -> None:
    torch.set_num_threads(1)
    model, data = tiny_model("llama-64", "sixfold"), batch(steps=STEPS)
    queue.put(continue_decoding(model, cache, data).numpy())


@pytest.mark.slow
def test_a_spawned_process() -> None:
    """Both go on from the same cache; what one writes the other does not see."""
    cache, data = filled("llama-64", True), batch(steps=STEPS)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=in_another_process, args=(cache, queue))
    process.start()
    expected = continue_decoding(tiny_model("llama-64", "sixfold"), cache, data)
    got: Tensor = torch.from_numpy(queue.get(timeout=60))
    process.join()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_a_model_and_its_cache_in_a_program_that_made_neither(tmp_path: Path) -> None:
    model, cache = fresh_model("llama-64"), filled("llama-64", True)
    model.set_attn_implementation("sixfold")
    torch.save((cache, model), tmp_path / "both")
    code = """
import os, torch
cache, model = torch.load(os.environ["BOTH"], weights_only=False)
from sixfold.integrations.transformers import cache_argument
print(cache.get_seq_length())
with torch.no_grad():
    logits = model(torch.tensor([[7]] * 3), **cache_argument(cache)).logits
print(*logits.argmax(2).flatten().tolist())
"""
    held, *tokens = map(int, printed(code, BOTH=str(tmp_path / "both")))
    assert held == cache.get_seq_length()
    with torch.no_grad():
        logits = model(torch.tensor([[7]] * 3), **cache_argument(cache)).logits
    assert tokens == logits.argmax(2).flatten().tolist()


def test_a_static_cache_says_what_to_do() -> None:
    static = filled("llama-64", True).static(300)
    with pytest.raises(SixfoldError, match="the cache it was made"):
        pickle.dumps(static)


def test_a_copy_from_a_device_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = filled("llama-64", True)
    pickled, load = pickle.dumps(cache), torch.load

    def missing(file: Any, map_location: Any = None, **options: Any) -> Any:
        if map_location is None:
            raise RuntimeError("Attempting to deserialize object on a device that is not there")
        return load(file, map_location=map_location, **options)

    monkeypatch.setattr(torch, "load", missing)
    twin = pickle.loads(pickled)
    for mine, other in zip(cache.compressed_layers, twin.compressed_layers, strict=True):
        assert all(map(torch.equal, mine.store.dequantized(), other.store.dequantized()))
