"""Operations on codes give the logits of the same operations on the decoded history."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from sixfold import TurboQuantCache
from sixfold.errors import SixfoldError
from tests.e2e.decoding import Batch, batch, forward, relative_error
from tests.e2e.models import tiny_model
from tests.memory import storage_bytes

History = list[tuple[Tensor, Tensor]]

STEPS = 6  # fewer than complete a page: nothing is encoded beside what already was
PROMPTS = (248, 203, 150)
EXACT = 1e-4

# The other end-to-end tests check shapes; here that would take longer than the models do.
pytestmark = pytest.mark.usefixtures("unhooked", "exact_arithmetic")

names = pytest.mark.parametrize("name", ["llama-64", "mistral"])
fused = pytest.mark.parametrize("fused", [True, False], ids=["fused", "dequantized"])


def filled(name: str, fused: bool, data: Batch, record_past: bool = False) -> TurboQuantCache:
    options: dict[str, Any] = {"bits": 4, "sink_tokens": 4, "recent_window": 0}
    model = tiny_model(name)
    cache = (TurboQuantCache.for_model if fused else _plain)(model, **options)
    if record_past:
        cache.activate_past_recording()
    run(name, cache, data, 0, data.prompt)
    return cache


def _plain(model: Any, **options: Any) -> TurboQuantCache:
    return TurboQuantCache(model.config, **options)


def run(name: str, cache: Cache, data: Batch, start: int, stop: int) -> Tensor:
    is_fused = isinstance(cache, TurboQuantCache) and cache.fused
    return forward(tiny_model(name, "sixfold" if is_fused else "eager"), cache, data, start, stop)


def history(cache: TurboQuantCache) -> History:
    """What every layer holds, decoded, in memory of its own."""
    stores = [layer.store for layer in cache.compressed_layers]
    return [tuple(x.clone() for x in store.dequantized()) for store in stores if store]


def dense(name: str, held: History, length: int) -> DynamicCache:
    """transformers' own cache with this history."""
    cache = DynamicCache(config=tiny_model(name).config)
    for layer, (keys, values) in zip(cache.layers, held, strict=True):
        layer.lazy_initialization(keys, values)
        start = max(keys.shape[2] - layer.sliding_window + 1, 0) if layer.is_sliding else 0
        layer.keys, layer.values = keys[:, :, start:], values[:, :, start:]
        if layer.is_sliding:
            layer.cumulative_length = length
    return cache


def check(name: str, cache: TurboQuantCache, held: History, data: Batch, length: int) -> None:
    """Decode a few tokens through `cache` and through a dense cache that holds `held`."""
    assert cache.get_seq_length() == length
    twin = dense(name, held, length)
    for step in range(length, length + STEPS):
        ours, theirs = (run(name, c, data, step, step + 1) for c in (cache, twin))
        assert relative_error(ours, theirs) < EXACT


def rows_of(data: Batch, rows: Tensor) -> Batch:
    return dataclasses.replace(data, ids=data.ids[rows], mask=data.mask[rows])


@names
@fused
def test_nothing_done(name: str, fused: bool) -> None:
    data = batch(PROMPTS)
    cache = filled(name, fused, data)
    check(name, cache, history(cache), data, data.prompt)


@pytest.mark.parametrize("count", [4, 57, 100, 247])
@names
@fused
def test_crop(name: str, fused: bool, count: int) -> None:
    data = batch(PROMPTS if count < 98 else PROMPTS[:1])
    cache = filled(name, fused, data, record_past=True)
    held = history(cache)
    cache.crop(-count)
    assert [len(x) for x in history(cache)] == [len(x) for x in held]
    held = [(keys[:, :, :-count], values[:, :, :-count]) for keys, values in held]
    check(name, cache, held, data, data.prompt - count)
    # And once more, now that something has been appended.
    held = [(keys[:, :, :-2], values[:, :, :-2]) for keys, values in history(cache)]
    cache.crop(-2)
    check(name, cache, held, data, data.prompt - count + STEPS - 2)


@names
@fused
def test_crop_to_nothing_and_reset(name: str, fused: bool) -> None:
    data = batch(PROMPTS)
    cache = filled(name, fused, data, record_past=True)
    held = history(cache)
    for forget in (lambda: cache.crop(-data.prompt), cache.reset):
        forget()
        assert cache.get_seq_length() == 0
        assert cache.nbytes == 0
        run(name, cache, data, 0, data.prompt)
        for ours, before in zip(history(cache), held, strict=True):
            assert all(map(torch.equal, ours, before))
    cache.crop(0)
    assert cache.get_seq_length() == data.prompt


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("gemma2", {}, 100),
        ("gemma2", {"skip_layers": [0]}, 100),
        ("gemma2", {"skip_layers": [1]}, 100),
        ("smollm3", {}, -3),
        ("lfm2", {}, 3),
        ("qwen3-next", {}, 3),
    ],
)
@pytest.mark.parametrize("reverse", [False, True])
def test_a_crop_that_is_refused_changes_no_layer(
    name: str, options: dict[str, Any], count: int, reverse: bool
) -> None:
    data = batch((248, 248))
    cache = TurboQuantCache.for_model(tiny_model(name), recent_window=0, **options)
    if name == "qwen3-next":
        cache.activate_past_recording()  # whose convolutions, then, would let go of tokens
    run(name, cache, data, 0, data.prompt)
    twin = cache.fork()
    before = [x.clone() for x in cache.tensors()]
    if reverse:
        cache.layers.reverse()
    with pytest.raises(SixfoldError, match=r"cannot remove|minus the number"):
        cache.crop(-count)
    if reverse:
        cache.layers.reverse()
    assert all(map(torch.equal, before, cache.tensors()))
    ours, theirs = (run(name, c, data, data.prompt, data.prompt + 1) for c in (cache, twin))
    assert torch.equal(ours, theirs)


@names
@fused
@pytest.mark.parametrize("rows", [[1], [2, 0], [0, 0, 1, 1, 2, 2], [2, 2, 0]])
def test_select_and_reorder(name: str, fused: bool, rows: list[int]) -> None:
    data, index = batch(PROMPTS), torch.tensor(rows)
    cache = filled(name, fused, data)
    held = [(keys[index], values[index]) for keys, values in history(cache)]
    operation = cache.reorder_cache if len(rows) == 3 else cache.batch_select_indices
    operation(index)
    check(name, cache, held, rows_of(data, index), data.prompt)


@names
@fused
def test_select_by_a_boolean_mask(name: str, fused: bool) -> None:
    data, keep = batch(PROMPTS), torch.tensor([True, False, True])
    cache = filled(name, fused, data)
    held = [(keys[keep], values[keep]) for keys, values in history(cache)]
    cache.batch_select_indices(keep)
    check(name, cache, held, rows_of(data, torch.tensor([0, 2])), data.prompt)


@names
@fused
def test_repeat_then_reorder_beams(name: str, fused: bool) -> None:
    data = batch(PROMPTS)
    cache = filled(name, fused, data)
    held = history(cache)
    cache.batch_repeat_interleave(2)
    wide = rows_of(data, torch.arange(3).repeat_interleave(2))
    # Let the beams differ before they are reordered.
    wide.ids[1::2, data.prompt :] = wide.ids[1::2, data.prompt :].flip(1)
    twin = dense(
        name, [(k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)) for k, v in held], 248
    )
    beams = torch.tensor([1, 1, 2, 3, 5, 4])
    for step in range(data.prompt, data.prompt + STEPS):
        ours, theirs = (run(name, c, wide, step, step + 1) for c in (cache, twin))
        assert relative_error(ours, theirs) < EXACT
        cache.reorder_cache(beams)
        twin.reorder_cache(beams)
        wide = rows_of(wide, beams)


@names
@fused
@pytest.mark.parametrize("clone", [TurboQuantCache.fork, copy.deepcopy])
def test_fork(name: str, fused: bool, clone: Any) -> None:
    data = batch(PROMPTS)
    parent = filled(name, fused, data)
    held = history(parent)
    children = [clone(parent) for _ in range(2)]
    shared = [*parent.tensors(), *children[0].tensors(), *children[1].tensors()]
    assert storage_bytes(shared) == parent.nbytes
    other = dataclasses.replace(data, ids=data.ids.flip(0).where(data.mask == 1, 0))
    check(name, children[0], held, data, data.prompt)
    check(name, children[1], held, other, data.prompt)
    children[1].batch_select_indices(torch.tensor([0]))
    check(name, parent, held, data, data.prompt)


@names
@fused
def test_many_continuations_of_one_prefix(name: str, fused: bool) -> None:
    data = batch((200, 200))
    cache = filled(name, fused, data, record_past=True)
    logits, sizes = [], []
    for _ in range(6):
        logits.append(run(name, cache, data, data.prompt, data.prompt + 24))
        sizes.append(cache.nbytes)
        cache.crop(-24)
    assert all(torch.equal(x, logits[0]) for x in logits[1:])
    assert len(set(sizes)) == 1


@names
@fused
def test_moving_to_where_it_is_loses_nothing(name: str, fused: bool) -> None:
    data = batch(PROMPTS)
    cache = filled(name, fused, data)
    held, size = history(cache), cache.nbytes
    assert cache.to("cpu") is cache
    assert cache.nbytes == size
    check(name, cache, held, data, data.prompt)
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    assert cache.get_seq_length() == data.prompt + STEPS


@names
def test_a_wrong_batch_loses_nothing(name: str) -> None:
    data = batch(PROMPTS)
    cache = filled(name, True, data)
    held = history(cache)
    with pytest.raises(ValueError, match="this layer holds"):
        run(name, cache, rows_of(data, torch.tensor([0, 1])), data.prompt, data.prompt + 1)
    check(name, cache, held, data, data.prompt)
