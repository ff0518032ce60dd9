"""A layer whose key map is given: one in memory for all sequences, whatever is done to it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sixfold.cache import CachePolicy, CompressedLayer, StaticLayer
from sixfold.cache.pages import PagedHistory
from sixfold.cache.state import layer_state, restore_layer
from sixfold.kernels._dispatch import available_backends
from sixfold.kernels.types import KeyMap
from tests.layers import Shape
from tests.memory import reachable_tensors

pytestmark = pytest.mark.usefixtures("exact_arithmetic")

POLICY = CachePolicy(key_bits=4, value_bits=3, recent_window=16)
SHAPE = Shape(batch=3)
Tokens = tuple[Tensor, Tensor, Tensor]


def given(seed: int = 5) -> KeyMap:
    generator = torch.Generator().manual_seed(seed)
    shape = 1, SHAPE.kv_heads, SHAPE.key_dim
    scale = torch.rand(shape, generator=generator) + 0.5
    return KeyMap(torch.randn(shape, generator=generator), scale)


def pinned(
    tokens: Tokens | None = None, policy: CachePolicy = POLICY, key_map: KeyMap | None = None
) -> CompressedLayer:
    query, keys, values = tokens or SHAPE.tokens(200)
    layer = CompressedLayer(keys, values, policy, None, key_map or given())
    layer.append(keys, values)
    layer.attend(query, scaling=SHAPE.scaling)
    return layer


def row(tokens: Tokens, number: int) -> Tokens:
    query, keys, values = (x[number : number + 1] for x in tokens)
    return query, keys, values


def step(layer: CompressedLayer | StaticLayer, tokens: Tokens) -> Tensor:
    query, keys, values = tokens
    layer.append(keys, values)
    return layer.attend(query, scaling=SHAPE.scaling)


def held_map(layer: Any) -> KeyMap:
    assert layer.prefix is not None
    key_map: KeyMap = layer.prefix.key_map
    return key_map


@pytest.mark.parametrize("backend", available_backends("attention"))
def test_sequences_of_a_batch_are_as_if_alone(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIXFOLD_BACKEND", backend)
    tokens, new = SHAPE.tokens(100), SHAPE.tokens(1, seed=1)
    together = pinned(tokens)
    out, keys = step(together, new), together.dequantized()[0]
    for number in range(SHAPE.batch):
        alone = pinned(row(tokens, number))
        torch.testing.assert_close(step(alone, row(new, number))[0], out[number])
        torch.testing.assert_close(alone.dequantized()[0][0], keys[number])


@pytest.mark.parametrize("backend", available_backends("attention"))
def test_every_backend_makes_the_same_of_it(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    outs = []
    for name in ("reference", backend):
        monkeypatch.setenv("SIXFOLD_BACKEND", name)
        layer = pinned(SHAPE.tokens(100))
        outs.append((step(layer, SHAPE.tokens(1, seed=1)), layer.dequantized()[0]))
    for expected, found in zip(*outs, strict=True):
        # Triton multiplies in half precision, which rounds off 2^-11 of numbers around 1.
        torch.testing.assert_close(found, expected, rtol=2**-10, atol=2**-10)


def test_the_map_is_the_one_given_and_codes_are_of_mapped_keys() -> None:
    tokens = SHAPE.tokens(200)
    far = given()._replace(mean=given().mean + 1e3)
    near, wrong = (pinned(tokens, key_map=x).dequantized()[0][:, :, 4:64] for x in (given(), far))
    keys = tokens[1][:, :, 4:64]
    # Beside a mean that is far from all keys, four bits are spent on the distance.
    assert (near - keys).norm() < 0.2 * keys.norm() < (wrong - keys).norm()


def test_it_waits_for_sinks_alone_before_a_page_is_written() -> None:
    policy = CachePolicy(sink_tokens=60, recent_window=0)
    query, keys, values = SHAPE.tokens(64)
    fitted = CompressedLayer(keys, values, policy)
    for layer, expected in ((fitted, 0), (pinned((query, keys, values), policy), 64)):
        if layer is fitted:
            step(layer, (query, keys, values))
        assert layer.history.tokens == expected
    later = CachePolicy(sink_tokens=70, recent_window=0)
    assert pinned((query, keys, values), later).history.tokens == 0


def test_no_query_is_counted() -> None:
    layer = pinned(SHAPE.tokens(20))
    assert layer.prefix is None
    assert layer.query_energy is None


def test_masks_still_show_the_padding() -> None:
    query, keys, values = SHAPE.tokens(100)
    mask = torch.ones(SHAPE.batch, 1, 100, 100, dtype=torch.bool).tril()
    mask[1, :, :, :30] = False
    layer = CompressedLayer(keys, values, POLICY, None, given())
    layer.append(keys, values)
    layer.attend(query, scaling=SHAPE.scaling, mask=mask)
    assert layer.padding.tolist() == [0, 30, 0]


def shuffled(layer: CompressedLayer) -> CompressedLayer:
    layer.select(torch.tensor([2, 0, 0, 1]))
    return layer


def moved(layer: CompressedLayer) -> CompressedLayer:
    layer.to(torch.device("cpu"), torch.float64)
    return layer


def stored(layer: CompressedLayer) -> CompressedLayer:
    description, tensors = layer_state(layer)
    assert tensors["key_map.mean"].shape[0] == len(layer.padding)
    return restore_layer(description, tensors, POLICY, None, given())


def cropped(layer: CompressedLayer) -> CompressedLayer:
    layer.crop(70)
    return layer


def reset(layer: CompressedLayer) -> CompressedLayer:
    layer.reset()
    assert layer.prefix is None
    step(layer, SHAPE.tokens(200))
    return layer


CHANGES: list[Callable[[CompressedLayer], Any]] = [
    *(shuffled, moved, stored, cropped, reset),
    *(CompressedLayer.fork, lambda layer: StaticLayer(layer, 300)),
]


@pytest.mark.parametrize("change", CHANGES)
def test_one_map_is_held_whatever_the_batch(change: Callable[[CompressedLayer], Any]) -> None:
    layer = change(pinned())
    key_map, batch = held_map(layer), len(layer.prefix.padding)
    assert key_map.mean.shape[0] == key_map.scale.shape[0] == 1
    assert torch.equal(key_map.mean, given().mean)
    assert torch.equal(key_map.scale, given().scale)
    assert key_map.map_index is not None
    assert key_map.map_index.tolist() == [0] * batch
    found = {x.untyped_storage().data_ptr() for x in layer.tensors()}
    assert {x.untyped_storage().data_ptr() for x in key_map.tensors()} <= found
    if isinstance(layer, CompressedLayer):
        assert layer.pinned is not None
        assert layer.pinned.mean.data_ptr() == key_map.mean.data_ptr()


def test_another_device_gets_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = pinned()
    # Pages count their tokens, which tensors without memory cannot.
    monkeypatch.setattr(PagedHistory, "to", lambda history, device: None)
    layer.to(torch.device("meta"))
    assert layer.pinned is not None
    assert held_map(layer).mean is layer.pinned.mean
    assert held_map(layer).scale is layer.pinned.scale
    assert {x.device.type for x in (*layer.pinned[:2], *held_map(layer))} == {"meta"}


@pytest.mark.parametrize("rows", [[0], [2, 0, 0, 1], [1, 1]])
def test_selected_sequences_continue_alike(rows: list[int]) -> None:
    tokens, new = SHAPE.tokens(200), SHAPE.tokens(70, seed=1)
    chosen = torch.tensor(rows)
    layer = pinned(tokens)
    layer.select(chosen)
    direct = pinned(tuple(x[chosen] for x in tokens))  # type: ignore[arg-type]
    more = tuple(x[chosen] for x in new)
    torch.testing.assert_close(step(layer, more), step(direct, more))  # type: ignore[arg-type]
    assert layer.history.tokens == direct.history.tokens == 192


def test_a_static_layer_decodes_alike_over_a_page() -> None:
    growing = pinned()
    static = StaticLayer(growing, max_tokens=300)
    for number in range(66):
        new = SHAPE.tokens(1, seed=number)
        torch.testing.assert_close(step(static, new), step(growing, new), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("field", ["mean", "scale"])
def test_stored_codes_keep_the_map_they_were_made_with(field: str) -> None:
    description, tensors = layer_state(pinned())
    changed = getattr(given(), field).clone()
    changed[0, 1, 5] += 0.5
    other = restore_layer(description, tensors, POLICY, None, given()._replace(**{field: changed}))
    key_map = held_map(other).of_sequences()
    assert torch.equal(getattr(key_map, field), getattr(given(), field).expand(3, -1, -1))
    assert other.pinned is not None
    assert torch.equal(getattr(other.pinned, field), changed)


@pytest.mark.parametrize("count", [20, 200])
def test_the_map_is_counted_before_and_after_the_first_page(count: int) -> None:
    layer = pinned(SHAPE.tokens(count))
    expected = {x.untyped_storage().data_ptr() for x in reachable_tensors(layer)}
    found = {x.untyped_storage().data_ptr() for x in layer.tensors()}
    assert expected <= found
    assert layer.pinned is not None
    assert layer.pinned.mean.untyped_storage().data_ptr() in found
