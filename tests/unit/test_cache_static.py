"""The layer of fixed size against the one that grows."""

import pytest
import torch

from sixfold.cache import CachePolicy, CompressedLayer
from sixfold.cache.static import StaticLayer
from sixfold.errors import ShapeError, SixfoldError

# Integer arithmetic rounds by the pages a thread gets, which differ.
pytestmark = pytest.mark.usefixtures("exact_arithmetic")

BATCH, HEADS, KV_HEADS, DIM = 2, 4, 2, 32


def tokens(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(BATCH, KV_HEADS, count, DIM, generator=generator) for _ in range(2))
    return torch.randn(BATCH, HEADS, count, DIM, generator=generator), keys, values


def prefilled(
    count: int = 200, sliding_window: int | None = None, padding: int = 0
) -> CompressedLayer:
    query, keys, values = tokens(count, seed=0)
    policy = CachePolicy(key_bits=4, value_bits=3, recent_window=16)
    layer = CompressedLayer(keys, values, policy, sliding_window)
    layer.append(keys, values)
    mask = None
    if padding:
        mask = torch.ones(BATCH, 1, count, count, dtype=torch.bool).tril()
        mask[0, :, :, :padding] = False
    layer.attend(query, scaling=DIM**-0.5, mask=mask)
    return layer


@pytest.mark.parametrize("sliding_window", [None, 100, 150])
@pytest.mark.parametrize("padding", [0, 70])
def test_every_step_is_that_of_the_growing_layer(sliding_window: int | None, padding: int) -> None:
    growing = prefilled(sliding_window=sliding_window, padding=padding)
    static = StaticLayer(growing, max_tokens=growing.held + 80)
    places = [x.data_ptr() for x in static.tensors()]
    sinks = torch.tensor([0.5, -1.0, 0.0, 2.0])
    held = growing.held
    for step in range(80):
        query, keys, values = tokens(1, seed=step + 1)
        growing.append(keys, values)
        static.append(keys, values)
        options = {"scaling": DIM**-0.5, "softcap": 20.0, "sink_logits": sinks}
        expected = growing.attend(query, **options)
        torch.testing.assert_close(static.attend(query, **options), expected, atol=1e-5, rtol=0)
    assert static.length == held + 80
    assert [x.data_ptr() for x in static.tensors()] == places


def test_pages_of_a_cropped_layer_keep_their_lengths() -> None:
    growing = prefilled(300)
    growing.crop(100)
    query, keys, values = tokens(1, seed=1)
    static = StaticLayer(growing, max_tokens=400)
    growing.append(keys, values)
    static.append(keys, values)
    expected = growing.attend(query, scaling=0.2)
    torch.testing.assert_close(static.attend(query, scaling=0.2), expected, atol=1e-5, rtol=0)


def test_a_full_layer_fails_rather_than_forget() -> None:
    growing = prefilled()
    static = StaticLayer(growing, max_tokens=growing.held + 1)
    _, keys, values = tokens(1, seed=1)
    static.append(keys, values)
    with pytest.raises(RuntimeError, match="static cache is full"):
        static.append(keys, values)


def test_what_cannot_be_static_says_so() -> None:
    _, keys, values = tokens(1, seed=1)
    empty = CompressedLayer(keys, values, CachePolicy())
    with pytest.raises(SixfoldError, match="prefill a page and the recent window"):
        StaticLayer(empty, max_tokens=100)
    layer = prefilled()
    with pytest.raises(SixfoldError, match=f"at least the {layer.held} tokens held, got 3"):
        StaticLayer(layer, max_tokens=3)
    _, keys, values = tokens(2, seed=1)
    with pytest.raises(ShapeError, match=r"one torch\.float32 token a step"):
        StaticLayer(layer, max_tokens=300).append(keys, values)
