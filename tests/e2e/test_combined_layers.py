"""Layers that hold more than keys and values, and what other code reads of a cache."""

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import Cache, DynamicCache, PreTrainedModel

from sixfold import TurboQuantCache
from sixfold.errors import FormatError, SixfoldError, UnsupportedModelError
from sixfold.integrations.transformers.keyword import cache_argument
from sixfold.integrations.transformers.storage import KIND
from sixfold.io import open_container, write_container
from tests.e2e.decoding import batch, decode, forward, fused_cache, relative_error
from tests.e2e.models import fresh_model, tiny_model
from tools.sweep_architectures import ERROR, MARGIN, PerturbedCache, architectures, build
from tools.sweep_architectures import decode as continue_all

pytestmark = pytest.mark.usefixtures("unhooked")

both_modes = pytest.mark.parametrize("fused", [True, False], ids=["fused", "dequantized"])
TOLERANCE = 0.03


def make(model: PreTrainedModel, fused: bool, **options: Any) -> TurboQuantCache:
    """A cache of 8 bits and no windows."""
    options = {"bits": 8, "sink_tokens": 0, "recent_window": 0, **options}
    if fused:
        return TurboQuantCache.for_model(model, **options)
    model.set_attn_implementation("eager")
    return TurboQuantCache(model.config, **options)


@torch.no_grad()
def step(model: PreTrainedModel, cache: Cache, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """Logits of the last of `ids`, which enter the cache."""
    return model(input_ids=ids, **cache_argument(cache), use_cache=True, **options).logits[:, -1]


def tokens(batch_size: int, count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 90, (batch_size, count), generator=generator)


# Cross-attention


@pytest.fixture(scope="module")
def mllama() -> PreTrainedModel:
    config = transformers.MllamaTextConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        cross_attention_layers=[1],
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.MllamaForCausalLM(config).eval()
    for parameter in model.parameters():
        # The gate of a new model is closed: nothing of an image would come through.
        parameter.data.normal_(0, 0.2) if parameter.dim() > 1 else parameter.data.fill_(1.0)
    return model


@both_modes
@pytest.mark.parametrize("image", [True, False])
def test_cross_attention_stays_dense(mllama: PreTrainedModel, fused: bool, image: bool) -> None:
    ids, patches = tokens(2, 140), torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(1))
    seen = {"cross_attention_states": patches} if image else {}

    def run(cache: Cache) -> torch.Tensor:
        logits = [step(mllama, cache, ids[:, :100], **seen)]
        return torch.stack([*logits, *(step(mllama, cache, ids[:, [i]]) for i in range(100, 140))])

    mllama.set_attn_implementation("eager")
    expected = run(DynamicCache(config=mllama.config))
    cache = make(mllama, fused)
    assert relative_error(run(cache), expected) < TOLERANCE
    assert [layer is not cache.layers[1] for layer in cache.layers] == [True, False, True]
    assert cache.fused == fused
    held = cache.layers[1].get_seq_length()
    assert held == (9 if image else 0)
    assert all(layer.get_seq_length() == 140 for layer in cache.compressed_layers)


@both_modes
def test_what_is_done_to_the_text_leaves_the_image(mllama: PreTrainedModel, fused: bool) -> None:
    ids, patches = tokens(2, 204), torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(1))
    # What attention is called without a mask, and `eager` is not, takes patches one after another.
    mllama.set_attn_implementation("sdpa" if fused else "eager")
    dense = DynamicCache(config=mllama.config)
    expected = step(mllama, dense, ids[:, :200], cross_attention_states=patches)
    cache = make(mllama, fused)
    step(mllama, cache, ids[:, :200], cross_attention_states=patches)
    cache.crop(-20)
    assert [layer.get_seq_length() for layer in cache.layers] == [180, 9, 180]
    assert relative_error(step(mllama, cache, ids[:, 180:200]), expected) < TOLERANCE
    # One that any attention has filled is taken over, the image as it is.
    converted = TurboQuantCache.from_cache(dense, mllama, 8, recent_window=0)
    assert [layer.get_seq_length() for layer in converted.layers] == [200, 9, 200]
    assert torch.equal(converted[1][0], dense.layers[1].keys)
    after = step(mllama, converted, ids[:, 200:])
    mllama.set_attn_implementation("sdpa")
    assert relative_error(after, step(mllama, dense, ids[:, 200:])) < TOLERANCE


@both_modes
def test_an_image_goes_with_the_text_that_brought_it(
    mllama: PreTrainedModel, fused: bool, tmp_path: Path
) -> None:
    """Whether the text is cropped, or a pass was interrupted after it had stored the image."""
    ids, patches = tokens(2, 204), torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(1))
    image = {"cross_attention_states": patches}

    def lengths(cache: Cache) -> list[int]:
        return [layer.get_seq_length() for layer in cache.layers]

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    cache = make(mllama, fused)
    step(mllama, cache, ids[:, :180])
    without = step(mllama, cache.fork(), ids[:, 180:200])
    expected = step(mllama, cache.fork(), ids[:, 180:200], **image)
    hook = mllama.model.layers[2].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        step(mllama, cache, ids[:, 180:200], **image)
    hook.remove()
    assert lengths(cache) == [200, 9, 180]
    assert cache.recover() == 180
    assert lengths(cache) == [180, 0, 180]
    assert relative_error(step(mllama, cache, ids[:, 180:200], **image), expected) < TOLERANCE
    cache.save(tmp_path / "image.sixfold")
    loaded = TurboQuantCache.load(tmp_path / "image.sixfold", mllama)
    for layer in (cache, twin := cache.fork(), loaded):
        layer.crop(-19)
        assert lengths(layer) == [181, 9, 181]
        layer.crop(-1)
        assert lengths(layer) == [180, 0, 180]
    assert relative_error(without, expected) > 2 * TOLERANCE
    assert relative_error(step(mllama, twin, ids[:, 180:200]), without) < TOLERANCE
    cache.reset()
    step(mllama, cache, ids[:, :20], **image)
    cache.crop(-20)
    assert lengths(cache) == [0, 0, 0]


@pytest.mark.parametrize(
    "parts",
    [None, 9, [[180]], [[180, 10]], [[200, 9]], [[-1, 9]], [["1", 9]], [[180, 5], [100, 4]]],
    ids=str,
)
def test_an_image_that_cannot_have_arrived_so(
    mllama: PreTrainedModel, parts: Any, tmp_path: Path
) -> None:
    ids, path = tokens(2, 200), tmp_path / "image.sixfold"
    patches = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(1))
    cache = make(mllama, fused=True)
    step(mllama, cache, ids[:, :180])
    step(mllama, cache, ids[:, 180:], cross_attention_states=patches)
    cache.save(path)
    with open_container(path, KIND) as container:
        description, tensors = container.description, container.read()
    assert description["layers"][1]["parts"] == [[180, 9]]
    description["layers"][1]["parts"] = parts
    write_container(path, KIND, description, tensors)
    with pytest.raises(FormatError, match="its description is wrong"):
        TurboQuantCache.load(path, mllama)


# States and indexers


@both_modes
@pytest.mark.parametrize("operation", ["select", "mask", "repeat", "reorder"])
def test_states_follow_their_sequences(operation: str, fused: bool) -> None:
    """In layers of transformers' own, too, which have no such operations."""
    model = fresh_model("qwen3-next", layer_types=["full_attention", "linear_attention"])
    ids = tokens(2, 204)
    cache = make(model, fused)
    step(model, cache, ids[:, :200])
    rows = {"select": [1], "mask": [1], "repeat": [0, 0, 1, 1], "reorder": [1, 0]}[operation]
    expected = step(model, cache.fork(), ids[:, 200:])[rows]
    if operation == "repeat":
        cache.batch_repeat_interleave(2)
    elif operation == "reorder":
        cache.reorder_cache(torch.tensor(rows))
    else:
        mask = torch.tensor([False, True])
        cache.batch_select_indices(mask if operation == "mask" else torch.tensor(rows))
    torch.testing.assert_close(step(model, cache, ids[rows, 200:]), expected)


COMBINED = {
    "hybrid": "FalconH1ForCausalLM",
    "hybrid_sliding": "ZayaForCausalLM",
    "indexed": "DeepseekV32ForCausalLM",
}
every_kind = pytest.mark.parametrize("kind", COMBINED)


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    return {k: build(architectures()[name], name, 1.5) for k, name in COMBINED.items()}


def test_each_kind_is_there(models: dict[str, PreTrainedModel]) -> None:
    layers = {k: make(model, fused=False).layers for k, model in models.items()}
    assert [type(x).__name__ for x in layers["hybrid"]] == ["HybridTurboQuantLayer"] * 4
    assert [x.is_sliding for x in layers["hybrid_sliding"]] == [False, True] * 2
    assert {type(x).__name__ for x in layers["indexed"]} == {"IndexedTurboQuantLayer"}


@pytest.mark.parametrize("rows", [[1], [0, 0, 1, 1]], ids=["select", "repeat"])
def test_states_of_layers_kept_as_they_are_follow_their_sequences(
    models: dict[str, PreTrainedModel], rows: list[int]
) -> None:
    model, ids = models["hybrid"], tokens(2, 204)
    cache = make(model, fused=True, skip_layers=[0])
    step(model, cache, ids[:, :200])
    expected = step(model, cache.fork(), ids[:, 200:])[rows]
    if len(rows) > 2:
        cache.batch_repeat_interleave(2)
    else:
        cache.batch_select_indices(torch.tensor(rows))
    # Products of another batch round otherwise.
    assert relative_error(step(model, cache, ids[rows, 200:]), expected) < 1e-3


@every_kind
@both_modes
@pytest.mark.filterwarnings("ignore:.*dequantized for it")
def test_each_kind_takes_key_maps(
    models: dict[str, PreTrainedModel], kind: str, fused: bool
) -> None:
    model, ids = models[kind], tokens(2, 204)
    fitted = make(model, fused)
    step(model, fitted, ids[:, :200])
    maps = fitted.key_maps()
    pinned = make(model, fused, key_map=maps)
    step(model, pinned, ids[:, :200])
    expected = step(model, pinned.fork(), ids[:, 200:])
    for copy in (pinned, pickle.loads(pickle.dumps(pinned))):
        for layer in copy.compressed_layers:
            assert layer.store is not None
            assert layer.store.prefix is not None
            assert len(layer.store.prefix.key_map.mean) == 1
        torch.testing.assert_close(step(model, copy, ids[:, 200:]), expected)
    assert relative_error(step(model, fitted, ids[:, 200:]), expected) < TOLERANCE


@pytest.mark.filterwarnings("ignore:.*dequantized for it")
def test_fields_that_differ_from_layer_to_layer(tmp_path: Path) -> None:
    """A config refuses to name one value of them, and so does a description of the model."""
    name = "Dots3NoteForCausalLM"
    if name not in architectures():
        pytest.skip("this transformers has no such model")
    model, ids = build(architectures()[name], name, 1.5), tokens(2, 151)
    ranks = [layer.kv_lora_rank for layer in model.config.per_layer_config]
    assert len(set(ranks)) == 2
    cache = make(model, fused=True)
    step(model, cache, ids[:, :150])
    cache.save(tmp_path / "file")
    with open_container(tmp_path / "file", KIND) as container:
        assert container.description["model"]["kv_lora_rank"] == ranks
    loaded = TurboQuantCache.load(tmp_path / "file", model)
    expected = step(model, cache, ids[:, 150:])
    assert torch.equal(step(model, loaded, ids[:, 150:]), expected)


Change = Callable[[Cache], Cache]


def _changed(cache: Cache, change: Callable[[Cache], Any]) -> Cache:
    change(cache)
    return cache


OPERATIONS: dict[str, Change] = {
    "reorder": lambda cache: _changed(cache, lambda c: c.reorder_cache(torch.tensor([1, 1, 0]))),
    "fork": lambda cache: cache.fork() if hasattr(cache, "fork") else cache,
    "reset": lambda cache: _changed(cache, lambda c: c.reset()),
}


@every_kind
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations(kind: str, operation: str, models: dict[str, PreTrainedModel]) -> None:
    """What is done to a cache is done to all that its layers hold."""
    model, ids = models[kind], tokens(3, 150)

    def run(cache: Cache) -> torch.Tensor:
        step(model, cache, ids)
        cache = OPERATIONS[operation](cache)
        return torch.stack([step(model, cache, tokens(3, 1, seed)) for seed in range(4)])

    model.set_attn_implementation("eager")
    expected = run(DynamicCache(config=model.config))
    noise = relative_error(run(PerturbedCache(model.config, ERROR)), expected)
    assert relative_error(run(make(model, fused=False)), expected) < MARGIN * noise < 0.2


@every_kind
def test_selected_and_repeated_rows(kind: str, models: dict[str, PreTrainedModel]) -> None:
    model, ids = models[kind], tokens(3, 150)
    cache = make(model, fused=False)
    step(model, cache, ids)
    cache.batch_select_indices(torch.tensor([2, 0])) if kind == "indexed" else [
        layer.batch_select_indices(torch.tensor([2, 0])) for layer in cache.compressed_layers
    ]
    for layer in cache.compressed_layers:
        layer.batch_repeat_interleave(2)
    expected = make(model, fused=False)
    step(model, expected, ids)
    expected.reorder_cache(torch.tensor([2, 2, 0, 0]))
    new = tokens(4, 1)
    assert torch.equal(step(model, cache, new), step(model, expected, new))


@every_kind
def test_a_fork_does_not_change_its_parent(kind: str, models: dict[str, PreTrainedModel]) -> None:
    model, ids = models[kind], tokens(1, 150)
    cache = make(model, fused=False)
    step(model, cache, ids)
    twin = cache.fork()
    before = [x.clone() for x in cache.tensors()]
    step(model, twin, tokens(1, 1))
    assert all(map(torch.equal, before, cache.tensors()))


@every_kind
@pytest.mark.filterwarnings("ignore:.*dequantized for it")
def test_what_a_dynamic_cache_holds_is_taken_over(
    kind: str, models: dict[str, PreTrainedModel]
) -> None:
    model, ids = models[kind], tokens(2, 150)
    model.set_attn_implementation("eager")
    source, perturbed = DynamicCache(config=model.config), PerturbedCache(model.config, ERROR)
    for cache in (source, perturbed):
        step(model, cache, ids)
    ours = TurboQuantCache.from_cache(source, model, bits=8, recent_window=0)
    assert all(layer.store.history.tokens >= 64 for layer in ours.compressed_layers)

    def run(cache: Cache) -> torch.Tensor:
        return torch.stack([step(model, cache, tokens(2, 1, seed)) for seed in range(4)])

    found = run(ours)
    model.set_attn_implementation("eager")
    expected = run(source)
    assert relative_error(found, expected) < MARGIN * relative_error(run(perturbed), expected) < 0.2


@every_kind
@pytest.mark.filterwarnings("ignore:.*dequantized for it")
def test_save_and_load(kind: str, models: dict[str, PreTrainedModel], tmp_path: Any) -> None:
    model, ids = models[kind], tokens(2, 150)
    cache = TurboQuantCache.for_model(model, 4)
    step(model, cache, ids)
    cache.save(tmp_path / "cache")
    loaded = TurboQuantCache.load(tmp_path / "cache", model)
    assert loaded.uncompressed_nbytes == cache.uncompressed_nbytes
    new = tokens(2, 1)
    assert torch.equal(step(model, loaded, new), step(model, cache, new))


def test_an_indexer_is_cropped(models: dict[str, PreTrainedModel]) -> None:
    model, ids = models["indexed"], tokens(1, 150)
    cache, expected = make(model, fused=False), make(model, fused=False)
    step(model, cache, ids)
    cache.crop(-5)
    step(model, expected, ids[:, :-5])
    assert [x.shape for x in cache.tensors()] == [x.shape for x in expected.tensors()]
    new = tokens(1, 1)
    assert relative_error(step(model, cache, new), step(model, expected, new)) < TOLERANCE


def test_a_recurrent_state_cannot_be_cropped(models: dict[str, PreTrainedModel]) -> None:
    cache = make(models["hybrid"], fused=False)
    step(models["hybrid"], cache, tokens(1, 20))
    assert not cache.is_croppable
    with pytest.raises(SixfoldError, match="state beside its attention"):
        cache.crop(-1)
    assert cache.get_seq_length() == 20


def test_all_that_is_held_is_counted(models: dict[str, PreTrainedModel]) -> None:
    model = models["hybrid"]
    cache = make(model, fused=False)
    step(model, cache, tokens(1, 20))
    states = [x for layer in cache.layers for x in layer.extra_tensors().values()]
    assert states
    assert {id(x) for x in states} <= {id(x) for x in cache.tensors()}


def test_no_static_cache_of_them(models: dict[str, PreTrainedModel]) -> None:
    cache = make(models["hybrid"], fused=True)
    continue_all(models["hybrid"], cache)
    with pytest.raises(UnsupportedModelError, match="recurrent state"):
        cache.static(512)


# What other code reads


@both_modes
@pytest.mark.parametrize("name", ["llama-64", "mistral", "qwen3-next", "lfm2"])
def test_a_cache_reads_like_a_dynamic_one(name: str, fused: bool) -> None:
    model, data = tiny_model(name), batch(steps=3)
    expected = DynamicCache(config=model.config)
    decode(model, expected, data)
    cache = fused_cache(name, sink_tokens=0, recent_window=0) if fused else make(model, False)
    for held in cache:
        assert held[:2] == (None, None)
    decode(model, cache, data)
    assert len(cache) == len(expected)
    for index, (keys, values, window) in enumerate(cache):
        theirs = expected.layers[index]
        if not isinstance(getattr(theirs, "keys", None), torch.Tensor):
            assert (keys, values) == (None, None)
            continue
        assert torch.equal(cache.layers[index].keys, keys)
        assert all(map(torch.equal, cache[index], (keys, values)))
        assert (keys.shape, values.shape) == (theirs.keys.shape, theirs.values.shape)
        # Padding is not attended, and need not be kept.
        real = data.mask[:, -keys.shape[2] :, None].bool()
        for ours, uncompressed in ((keys, theirs.keys), (values, theirs.values)):
            kept = [x.transpose(1, 2)[real.squeeze(-1)] for x in (ours, uncompressed)]
            assert relative_error(*kept) < TOLERANCE
        sliding = getattr(theirs, "sliding_window", None)
        assert (window is None) if sliding is None else int(window) == sliding


def test_a_dynamic_cache_made_of_it_continues() -> None:
    model, data = fresh_model("mistral"), batch(steps=4)
    cache = make(model, fused=True)
    forward(model, cache, data, 0, data.prompt)
    copied = DynamicCache(list(cache))
    for layer in copied.layers:
        layer.cumulative_length = data.prompt
    last = (data.prompt, data.prompt + 1)
    assert (
        relative_error(forward(model, copied, data, *last), forward(model, cache, data, *last))
        < TOLERANCE
    )


# Attention weights


def test_attention_weights_that_are_not_computed_are_missed_aloud() -> None:
    model, data = fresh_model("llama-64"), batch(steps=0)
    cache = make(model, fused=True)
    with pytest.warns(UserWarning, match="computes no attention weights"):
        model(data.ids, **cache_argument(cache), output_attentions=True)


def test_attention_weights_that_transformers_records_are_missed_aloud() -> None:
    """Its GPT-2 does not tell the attention function that somebody waits for them."""
    model, ids = fresh_model("gpt2"), tokens(1, 80)
    cache = make(model, fused=True)
    with pytest.warns(UserWarning, match="computes no attention weights"):
        model(ids, **cache_argument(cache), output_attentions=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids, **cache_argument(cache))


def test_attention_weights_of_the_config_are_missed_aloud() -> None:
    model = fresh_model("llama-64")
    model.config.output_attentions = True
    with pytest.warns(UserWarning, match="computes no attention weights"):
        make(model, fused=True)


def test_attention_weights_of_dequantized_tensors() -> None:
    model, data = fresh_model("llama-64"), batch(steps=0)
    cache = make(model, fused=False)
    out = model(data.ids, **cache_argument(cache), output_attentions=True)
    assert out.attentions[0].shape == (3, 4, data.prompt, data.prompt)
