"""Key maps given to caches: for many sequences, from other texts, from files."""

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from benchmarks.hard import with_outlier_channels
from sixfold import KeyMaps, TurboQuantCache
from sixfold.errors import ShapeError, SixfoldError
from sixfold.eval.caches import compressed
from sixfold.eval.embedded import haystack, load_embedded
from sixfold.eval.perplexity import compare_caches, fill, windows_of
from tests.e2e.decoding import (
    Batch,
    batch,
    continue_decoding,
    decode,
    forward,
    fused_cache,
    relative_error,
    uncompressed_logits,
)
from tests.e2e.models import ARCHITECTURES, fresh_model, tiny_model
from tests.memory import storage_bytes

pytestmark = pytest.mark.usefixtures("unhooked", "exact_arithmetic")

NAME = "llama-64"
ALONE = (248,)


def tiny() -> PreTrainedModel:
    return tiny_model(NAME, "sixfold")


def cache(maps: KeyMaps | None = None, bits: float = 4, **options: Any) -> TurboQuantCache:
    return TurboQuantCache.for_model(tiny(), bits, key_map=maps, **options)


def filled(data: Batch, maps: KeyMaps | None = None, chunk: int = 10**6) -> TurboQuantCache:
    found = cache(maps)
    for start in range(0, data.prompt, chunk):
        forward(tiny(), found, data, start, min(start + chunk, data.prompt))
    return found


def maps_of(seed: int = 7) -> KeyMaps:
    """Those of another text."""
    return filled(batch(ALONE, seed=seed)).key_maps()


def row(data: Batch, number: int, prompt: int) -> Batch:
    first = data.prompt - prompt
    ids, mask = (x[number : number + 1, first:] for x in (data.ids, data.mask))
    return Batch(ids, mask, prompt)


def codes(found: TurboQuantCache) -> list[Tensor]:
    """Key codes of every layer."""
    runs = [layer.store.history.runs for layer in found.compressed_layers if layer.store]
    return [torch.cat([run.slab.pool.key_codes[run.slots] for run in x], 1) for x in runs]


def test_the_maps_of_a_sequence_reproduce_its_cache() -> None:
    data = batch(ALONE)
    fitted = filled(data)
    pinned = filled(data, fitted.key_maps())
    for expected, found in zip(codes(fitted), codes(pinned), strict=True):
        assert torch.equal(found, expected)
    logits = (continue_decoding(tiny(), x, data) for x in (fitted, pinned))
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    ("prompts", "bits", "allowed"), [((248, 248), 4, 1e-4), ((248, 150), 8, 0.02)]
)
def test_sequences_share_one_map(prompts: tuple[int, ...], bits: float, allowed: float) -> None:
    """Each is as if alone with it; where one is padded, but for what its pages begin with."""
    maps, data = maps_of(), batch(prompts)
    together = decode(tiny(), cache(maps, bits), data)
    for number, prompt in enumerate(prompts):
        alone = decode(tiny(), cache(maps, bits), row(data, number, prompt))
        assert relative_error(together[number], alone[0]) < allowed


@pytest.mark.parametrize("chunk", [1, 48, 100])
def test_chunks_change_no_code_of_the_first_layer(chunk: int) -> None:
    """Whose keys depend on nothing that was read from codes; a fitted map would."""
    data, maps = batch(ALONE), maps_of()
    pinned = [codes(filled(data, maps, n))[0] for n in (chunk, data.prompt)]
    fitted = [codes(filled(data, None, n))[0] for n in (chunk, data.prompt)]
    # Keys differ in the rounding of a product of matrices.
    assert float((pinned[0] != pinned[1]).float().mean()) < 1e-3
    assert float((fitted[0] != fitted[1]).float().mean()) > 0.1


def test_eight_bits_are_those_of_the_uncompressed_model() -> None:
    expected = uncompressed_logits(NAME)
    maps = maps_of()
    fused = decode(tiny(), cache(maps, bits=8), batch())
    model = tiny_model(NAME, "eager")
    dequantized = decode(model, TurboQuantCache(model.config, 8, key_map=maps), batch())
    assert relative_error(fused, expected) < 0.02
    assert relative_error(dequantized, expected) < 0.02


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_takes_the_maps_of_its_cache(name: str) -> None:
    """Fused and dequantized, with sliding windows, latents and states beside the attention."""
    expected, model = uncompressed_logits(name), tiny_model(name, "eager")
    fitted = TurboQuantCache(model.config, 8)
    decode(model, fitted, batch())
    maps, logits = fitted.key_maps(), []
    for found in (
        TurboQuantCache(model.config, 8, key_map=maps),
        fused_cache(name, key_map=maps),
    ):
        logits.append(decode(model, found, batch()))
        assert list(found.key_maps().layers) == list(ARCHITECTURES[name].compressed)
    assert all(relative_error(x, expected) < 0.04 for x in logits)


def test_a_map_is_counted_once_whatever_the_batch() -> None:
    maps, data = maps_of(), batch((248, 248, 248))
    fitted, pinned = filled(data), filled(data, maps)
    one = sum(x.nbytes for pair in maps.layers.values() for x in pair)
    # Two maps less, and for every layer and sequence which map it has.
    assert fitted.nbytes - pinned.nbytes == 2 * one - len(maps.layers) * 3 * 8
    assert pinned.nbytes == storage_bytes(pinned.tensors())


def test_caches_share_the_memory_of_their_maps() -> None:
    maps, data = maps_of(), batch(ALONE)
    with ThreadPoolExecutor(2) as pool:
        caches = list(pool.map(lambda _: filled(data, maps), range(4)))
    for number, pair in maps.layers.items():
        for found in caches:
            key_map = found.layers[number].store.prefix.key_map
            assert [x.data_ptr() for x in key_map[:2]] == [x.data_ptr() for x in pair]
    first, *others = (continue_decoding(tiny(), x, data) for x in caches)
    assert all(torch.equal(first, x) for x in others)


def by_file(found: TurboQuantCache, path: Path, maps: KeyMaps) -> TurboQuantCache:
    found.save(path / "cache.sixfold")
    return TurboQuantCache.load(path / "cache.sixfold", tiny(), key_map=maps)


def by_plain_file(found: TurboQuantCache, path: Path, maps: KeyMaps) -> TurboQuantCache:
    found.save(path / "cache.sixfold")
    return TurboQuantCache.load(path / "cache.sixfold", tiny())


def recovered(found: TurboQuantCache, path: Path, maps: KeyMaps) -> TurboQuantCache:
    found.layers[0].store.append(*(torch.zeros(3, 2, 1, 64) for _ in range(2)))
    found.recover()
    return found


def refilled(found: TurboQuantCache, path: Path, maps: KeyMaps) -> TurboQuantCache:
    found.reset()
    forward(tiny(), found, batch(), 0, batch().prompt)
    return found


WAYS: dict[str, Callable[[TurboQuantCache, Path, KeyMaps], TurboQuantCache]] = {
    "fork": lambda found, path, maps: found.fork(),
    "deepcopy": lambda found, path, maps: copy.deepcopy(found),
    "pickle": lambda found, path, maps: pickle.loads(pickle.dumps(found)),
    "to": lambda found, path, maps: found.to("cpu", torch.float32),
    "save and load": by_file,
    "save and load alone": by_plain_file,
    "recover": recovered,
    "reset": refilled,
    "static": lambda found, path, maps: found.static(300),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_whatever_is_done_to_a_cache_it_continues(way: Any, tmp_path: Path) -> None:
    maps, data, model = maps_of(), batch(), tiny()
    expected = continue_decoding(model, filled(data, maps), data)
    found = way(filled(data, maps), tmp_path, maps)
    for number, pair in found.key_maps().layers.items():
        assert all(torch.equal(*x) for x in zip(pair, maps.layers[number], strict=True))
    torch.testing.assert_close(continue_decoding(model, found, data), expected, rtol=0, atol=1e-4)
    if way not in (WAYS["static"], by_plain_file):
        # What the next prompt will be coded with.
        found.reset()
        assert found.key_maps().layers.keys() == maps.layers.keys()


def test_a_file_from_before_the_first_page_can_be_pinned(tmp_path: Path) -> None:
    """Without the map the loaded cache would fit one, and without having seen the queries."""
    maps, data, model = maps_of(), batch(ALONE), tiny()
    expected, found = cache(maps), cache(maps)
    for each in (expected, found):
        forward(model, each, data, 0, 60)
    found = by_file(found, tmp_path, maps)
    for each in (expected, found):
        forward(model, each, data, 60, 200)
    for mine, other in zip(codes(found), codes(expected), strict=True):
        assert torch.equal(mine, other)


def test_a_filled_cache_is_compressed_with_given_maps() -> None:
    maps, data, model = maps_of(), batch(), tiny()
    source = DynamicCache(config=model.config)
    forward(model, source, data, 0, data.prompt)
    mask = data.mask[:, : data.prompt]
    found = TurboQuantCache.from_cache(source, model, 4, attention_mask=mask, key_map=maps)
    # What another attention has filled is coded as if our own had.
    expected = continue_decoding(model, filled(data, maps), data)
    torch.testing.assert_close(
        continue_decoding(model, found, data), expected, rtol=1e-2, atol=1e-2
    )


def test_maps_of_all_layers_serve_a_cache_that_skips_some() -> None:
    maps = maps_of()
    found = cache(maps, skip_layers=[0])
    decode(tiny(), found, batch(ALONE))
    assert list(found.key_maps().layers) == [1]
    with pytest.raises(ShapeError, match=r"differ in \[0\]"):
        cache(found.key_maps())


def test_maps_that_do_not_fit_are_refused() -> None:
    maps, (mean, scale) = maps_of().layers, maps_of().layers[0]
    with pytest.raises(SixfoldError, match=r"must be a sixfold\.KeyMaps"):
        cache(dict(maps))  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"differ in \[2\]"):
        cache(KeyMaps({**maps, 2: (mean, scale)}))
    for wrong in ((mean[:1], scale[:1]), (mean[:, :20], scale[:, :20])):
        with pytest.raises(ShapeError, match="layer 1 has 2 KV heads of 64 dimensions"):
            cache(KeyMaps({**maps, 1: wrong}))
        # Without the model the first tokens say so.
        unseen = TurboQuantCache(tiny().config, key_map=KeyMaps({0: wrong, 1: wrong}))
        with pytest.raises(ShapeError, match="made for another model"):
            unseen.update(torch.zeros(1, 2, 3, 64), torch.zeros(1, 2, 3, 64), 0)
        assert unseen.get_seq_length() == 0


def test_a_cache_without_maps_says_so() -> None:
    data = batch(ALONE)
    for tokens in (0, 60):
        short = cache()
        if tokens:
            forward(tiny(), short, data, 0, tokens)
        with pytest.raises(SixfoldError, match=f"layer 0 has no key map yet, after {tokens} "):
            short.key_maps()
    assert cache(maps_of()).key_maps().layers.keys() == {0, 1}


def test_other_weights_may_use_the_same_maps() -> None:
    """They are exact for any: a fine-tuned model need not have its own."""
    model, data = fresh_model(NAME), batch(ALONE)
    model.get_decoder().layers[1].self_attn.k_proj.weight.data *= 1.5
    expected = decode(model, DynamicCache(config=model.config), data)
    logits = decode(model, TurboQuantCache.for_model(model, 8, key_map=maps_of()), data)
    assert relative_error(logits, expected) < 0.02


def test_another_text_is_as_good() -> None:
    """On outlier channels, at two bits, where no map at all loses most of the model."""
    plain, tokenizer = load_embedded()
    model = with_outlier_channels(plain.requires_grad_(False))
    *windows, other = windows_of(tokenizer, haystack(), 512, 4)
    source = TurboQuantCache.for_model(model)
    fill(model, other, source)
    found = compare_caches(
        model,
        torch.stack(windows),
        {
            "fitted": compressed(2),
            "pinned": compressed(2, key_map=source.key_maps()),
            "none": compressed(2, center_keys=False, equalize_keys=False),
        },
        prefill=384,
    )
    kl = {name: result.kl.mean for name, result in found.items()}
    assert kl["pinned"] < 1.3 * kl["fitted"]
    assert kl["none"] > 4 * kl["pinned"]
