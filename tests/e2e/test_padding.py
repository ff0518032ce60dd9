"""Left padding that no mask shows to a layer that decodes its tokens for the model's attention.

There keys have to show it, or padding would be the tokens that are kept exactly.
"""

import dataclasses
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from sixfold import TurboQuantCache
from sixfold.cache import CachePolicy, CompressedLayer
from sixfold.cache.affine import leading_padding
from sixfold.cache.state import layer_state, restore_layer
from sixfold.errors import FormatError, SixfoldError
from tests.e2e.decoding import batch, continue_decoding, forward, relative_error
from tests.e2e.models import ARCHITECTURES, tiny_model

pytestmark = pytest.mark.usefixtures("unhooked", "exact_arithmetic")

PROMPTS = (60, 180, 200, 197, 250)
PADDING = [190, 70, 50, 53, 0]


def fixed(cache: TurboQuantCache) -> list[list[int]]:
    """Where the exact first tokens of every sequence begin, layer by layer."""
    stores = [layer.store for layer in cache.compressed_layers if layer.sliding_window is None]
    return [x.prefix.padding.tolist() for x in stores if x is not None and x.prefix is not None]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_first_tokens_are_those_after_the_padding(name: str, attention: str) -> None:
    """Eager attention shows no mask."""
    if attention == "sdpa" and not tiny_model(name)._supports_sdpa:
        pytest.skip("the model has no such attention")
    model, data = tiny_model(name, attention), batch(PROMPTS, steps=1)
    cache = TurboQuantCache(model.config, 8, fit_tokens=0)
    forward(model, cache, data, 0, data.prompt)
    seeing_all = [layer for layer in cache.compressed_layers if layer.sliding_window is None]
    assert fixed(cache) == [PADDING] * len(seeing_all)


def test_from_cache_without_a_mask() -> None:
    """And attention on codes, which is shown the mask afterwards, takes it for what it is."""
    model, data = tiny_model("llama-64"), batch(PROMPTS)
    dense = DynamicCache(config=model.config)
    forward(model, dense, data, 0, data.prompt)
    cache = TurboQuantCache.from_cache(dense, tiny_model("llama-64", "sixfold"), 8, fit_tokens=0)
    expected = continue_decoding(model, dense, data)
    found = continue_decoding(tiny_model("llama-64", "sixfold"), cache, data)
    assert relative_error(found, expected) < 0.02
    assert fixed(cache) == [PADDING] * len(cache)
    assert not any(layer.store.prefix.assumed for layer in cache.compressed_layers)


def test_a_file_of_a_cache_that_no_mask_was_shown_to(tmp_path: Path) -> None:
    model, data = tiny_model("llama-64"), batch(PROMPTS)
    cache = TurboQuantCache(model.config, 8, fit_tokens=0)
    forward(model, cache, data, 0, data.prompt)
    cache.save(tmp_path / "x.sixfold")
    loaded = TurboQuantCache.load(tmp_path / "x.sixfold", tiny_model("llama-64", "sixfold"))
    assert all(layer.store.prefix.assumed for layer in loaded.compressed_layers)
    expected = continue_decoding(model, cache, data)
    found = continue_decoding(tiny_model("llama-64", "sixfold"), loaded, data)
    assert relative_error(found, expected) < 0.02


@pytest.mark.parametrize("copied", ["file", "pickle"])
def test_a_cache_that_waits_and_was_shown_half(copied: str, tmp_path: Path) -> None:
    """Filled by `from_cache` without a mask, attended once, and then on its way."""
    model, data = tiny_model("llama-64", "sixfold"), batch((60, 90, 100))
    dense = DynamicCache(config=model.config)
    forward(model, dense, data, 0, data.prompt)
    cache = TurboQuantCache.from_cache(dense, model, 8, fit_tokens=102)
    forward(model, cache, data, data.prompt, data.prompt + 1)
    if copied == "file":
        cache.save(tmp_path / "x.sixfold")
        cache = TurboQuantCache.load(tmp_path / "x.sixfold", model)
    else:
        cache = pickle.loads(pickle.dumps(cache))
    for layer in cache.compressed_layers:
        layer.store.compress(now=True)
        assert not layer.store.observed
        assert layer.store._fixed_prefix().padding.tolist() == [40, 10, 0]


def repeated(first: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a text that begins with one token again and again, without positions."""
    generator = torch.Generator().manual_seed(3)
    keys, values = (torch.randn(2, 2, 300, 32, generator=generator) for _ in range(2))
    for x in (keys, values):
        x[:1, :, :first] = x[:1, :, :1]
    return keys, values


def attended(layer: CompressedLayer, keys: Tensor) -> Tensor:
    # The text is about its beginning.
    query = 3 * keys[:, :, :1]
    return layer.attend(query, scaling=32**-0.5)


def test_what_was_taken_for_padding_is_attended_all_the_same() -> None:
    keys, values = repeated(first=12)
    layer = CompressedLayer(keys, values, CachePolicy.spending(8, fit_tokens=0))
    layer.append(keys, values)
    layer.compress()
    assert layer.prefix is not None
    assert layer.prefix.padding.tolist() == [12, 0]
    new = torch.randn(2, 2, 1, 32, generator=torch.Generator().manual_seed(4))
    # The text is about its beginning.
    query = 3 * keys[:, :, :1]
    weights = (query @ torch.cat([keys, new], 2).mT * 32**-0.5).softmax(-1)
    assert float(weights[0, :, :, :12].sum(-1).min()) > 0.5
    layer.append(new, new)
    with pytest.raises(SixfoldError):
        layer.attend(query, scaling=32**-0.5, softcap=-1.0)
    assert layer.prefix.assumed
    found = layer.attend(query, scaling=32**-0.5)
    assert relative_error(found, weights @ torch.cat([values, new], 2)) < 0.03


@pytest.mark.parametrize("shown", ["to from_cache", "to nobody", "in a file"])
def test_a_static_cache_hides_the_padding(shown: str, tmp_path: Path) -> None:
    model, data = tiny_model("llama-64"), batch(PROMPTS)
    dense = DynamicCache(config=model.config)
    forward(model, dense, data, 0, data.prompt)
    mask = data.mask[:, : data.prompt] if shown == "to from_cache" else None
    if shown == "in a file":
        cache = TurboQuantCache(model.config, 8, fit_tokens=0)
        forward(model, cache, data, 0, data.prompt)
        cache.save(tmp_path / "x.sixfold")
        fused = tiny_model("llama-64", "sixfold")
        cache = TurboQuantCache.load(tmp_path / "x.sixfold", fused)
    else:
        fused = tiny_model("llama-64", "sixfold")
        cache = TurboQuantCache.from_cache(dense, fused, 8, attention_mask=mask, fit_tokens=0)
    assert all(layer.store.prefix.assumed == (mask is None) for layer in cache.compressed_layers)
    static = cache.static(data.ids.shape[1])
    found = continue_decoding(fused, static, data)
    assert relative_error(found, continue_decoding(model, dense, data)) < 0.02


@pytest.mark.parametrize("sliding_window", [None, 310])
def test_a_mask_that_some_query_sees_it_through(sliding_window: int | None) -> None:
    """The last query, or the first head, may not attend what another one does."""
    keys, values = repeated(first=12)
    policy = CachePolicy.spending(8, fit_tokens=0)
    layer = CompressedLayer(keys, values, policy, sliding_window)
    layer.append(keys, values)
    layer.compress()
    new = torch.randn(2, 2, 40, 32, generator=torch.Generator().manual_seed(4))
    layer.append(new, new)
    seen = torch.ones(340, 340, dtype=torch.bool).tril()
    seen &= ~seen.tril(-(sliding_window or 340))
    mask = seen[300:].expand(2, 2, 40, 340).clone()
    mask[:, 0, -5:, :50] = False
    query = 3 * keys[:, :, :1] + 0.1 * new
    logits = (query @ torch.cat([keys, new], 2).mT * 32**-0.5).masked_fill(~mask, -torch.inf)
    expected = logits.softmax(-1) @ torch.cat([values, new], 2)
    found = layer.attend(query, scaling=32**-0.5, mask=mask)
    assert relative_error(found, expected) < 0.03


def test_what_may_yet_be_read_from_the_pages_is_checked() -> None:
    keys, values = repeated(first=12)
    policy = CachePolicy.spending(8, fit_tokens=0)
    layer = CompressedLayer(keys, values, policy)
    layer.append(keys, values)
    layer.compress()
    description, tensors = layer_state(layer)
    assert description["assumed"]
    restore_layer(description, tensors, policy, None)
    tensors["key_scales"][0, 0, :, 13] = torch.inf
    with pytest.raises(FormatError, match="key_scales"):
        restore_layer(description, tensors, policy, None)
    # Elsewhere nobody reads them.
    restore_layer({**description, "assumed": False}, tensors, policy, None)


def test_a_repeated_token_that_rope_turns_is_no_padding() -> None:
    model = tiny_model("llama-64")
    data = batch((250,), steps=1)
    data = dataclasses.replace(data, ids=torch.cat([torch.full((1, 40), 7), data.ids[:, 40:]], 1))
    cache = TurboQuantCache(model.config, 8, fit_tokens=0)
    forward(model, cache, data, 0, data.prompt)
    assert fixed(cache) == [[0], [0]]


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_one_vector_added_to_all_keys_changes_no_padding(offset: float) -> None:
    keys, _ = repeated(first=12)
    assert leading_padding(keys + offset).tolist() == [12, 0]


def test_padding_that_differs_from_chunk_to_chunk() -> None:
    keys, _ = repeated(first=12)
    keys[0, :, 5:12] *= 2
    assert leading_padding(keys).tolist() == [12, 0]


def test_attention_sinks_that_are_nearly_the_same_are_no_padding() -> None:
    """Those of real models differ by a hundredth of their length, and from other keys by all."""
    keys, _ = repeated(first=0)
    sink = 100 * torch.randn(32, generator=torch.Generator().manual_seed(6))
    keys[:, :, :8] = sink + 0.1 * keys[:, :, :8]
    assert leading_padding(keys).tolist() == [0, 0]


def test_a_sequence_that_is_all_padding_so_far() -> None:
    keys = torch.randn(3, 2, 100, 8, generator=torch.Generator().manual_seed(5))
    keys[1] = keys[1, :, :1]
    keys[2, :, :99] = keys[2, :, :1]
    assert leading_padding(keys).tolist() == [0, 100, 99]


def test_nothing_but_one_token_is_no_padding() -> None:
    assert leading_padding(torch.ones(2, 3, 100, 8)).tolist() == [0, 0]
    assert leading_padding(torch.full((1, 3, 100, 8), torch.nan)).tolist() == [0]
    assert leading_padding(torch.ones(1, 1, 1, 8)).tolist() == [0]
