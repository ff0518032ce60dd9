"""A saved cache continues as if it had never been saved; anything else is refused."""

import copy
import dataclasses
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from sixfold import TurboQuantCache, io
from sixfold.errors import FormatError, SixfoldError
from sixfold.integrations.transformers.keyword import cache_argument
from tests.e2e.decoding import Batch, batch, forward
from tests.e2e.models import fresh_model, tiny_model
from tests.memory import storage_bytes
from tools.sweep_architectures import architectures, build

pytestmark = [
    pytest.mark.usefixtures("unhooked"),
    pytest.mark.filterwarnings("ignore:.*dequantized for it"),
]

STEPS = 10  # enough to complete a page after loading
PROMPTS = (248, 203, 150)


def save_and_load(cache: TurboQuantCache, model: PreTrainedModel, path: Path) -> TurboQuantCache:
    cache.save(path)
    loaded = TurboQuantCache.load(path, model)
    path.write_bytes(b"\0" * path.stat().st_size)
    return loaded


def same(ours: TurboQuantCache, theirs: TurboQuantCache) -> None:
    """Both hold the same tokens and codes, bit by bit."""
    assert ours.get_seq_length() == theirs.get_seq_length()
    for mine, other in zip(ours.compressed_layers, theirs.compressed_layers, strict=True):
        assert (mine.policy, mine.sliding_window) == (other.policy, other.sliding_window)
        if mine.store is None or other.store is None:
            assert mine.store is other.store
            continue
        assert mine.store.held == other.store.held
        assert all(map(torch.equal, mine.store.dequantized(), other.store.dequantized()))


def continues_alike(
    cache: TurboQuantCache, loaded: TurboQuantCache, model: PreTrainedModel, data: Batch
) -> None:
    same(loaded, cache)
    start = cache.get_seq_length()
    for step in range(start, start + STEPS):
        # Pages that lay in several slabs lie in one now: sums may be added in another order.
        exactly = runs(cache) == runs(loaded)
        ours, theirs = (forward(model, c, data, step, step + 1) for c in (cache, loaded))
        assert torch.equal(ours, theirs) or not exactly
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert exactly or step > start
    same(loaded, cache)


def runs(cache: TurboQuantCache) -> list[list[int]]:
    """How the tokens of every layer are spread over slabs."""
    stores = [layer.store for layer in cache.compressed_layers]
    return [[run.tokens for run in store.history.runs] for store in stores if store]


def nothing(cache: TurboQuantCache, data: Batch) -> Batch:
    return data


def crop(cache: TurboQuantCache, data: Batch) -> Batch:
    cache.crop(-100)
    return data


def beams(cache: TurboQuantCache, data: Batch) -> Batch:
    cache.batch_repeat_interleave(2)
    rows = torch.tensor([1, 1, 0, 4, 5, 5])
    cache.reorder_cache(rows)
    rows = torch.arange(3).repeat_interleave(2)[rows]
    return dataclasses.replace(data, ids=data.ids[rows], mask=data.mask[rows])


CASES: dict[str, tuple[str, tuple[int, ...], dict[str, Any], Any]] = {
    "tokens": ("llama-64", (248,), {}, nothing),
    "padded": ("llama-64", PROMPTS, {}, nothing),
    "cropped": ("llama-64", PROMPTS[:1], {}, crop),
    "beams": ("llama-64", PROMPTS, {}, beams),
    "no page yet": ("llama-64", (40, 30), {}, nothing),
    "one token": ("llama-64", (1,), {}, nothing),
    "pairs": ("llama-80", PROMPTS, {"key_bits": 3.5, "value_bits": 2.5, "seed": 3}, nothing),
    "no map": ("llama-64", PROMPTS, {"center_keys": False, "equalize_keys": False}, nothing),
    "sliding": ("mistral", PROMPTS, {}, nothing),
    "sliding beams": ("mistral", PROMPTS, {}, beams),
    "both": ("gemma2", PROMPTS, {}, nothing),
    "skipped": ("gemma2", PROMPTS, {"skip_layers": [0]}, nothing),
    "skipped full": ("gemma2", PROMPTS, {"skip_layers": [1]}, nothing),
    "per layer": ("llama-64", PROMPTS, {"per_layer": {1: {"key_bits": 8}}}, nothing),
    "sinks": ("gpt-oss", PROMPTS, {}, nothing),
    "latent": ("deepseek-v3", PROMPTS, {}, nothing),
    "convolutions": ("lfm2", (248, 248), {}, nothing),
    "linear attention": ("qwen3-next", (248, 248), {}, nothing),
    "dims differ": ("mimo-v2", PROMPTS, {}, nothing),
    "trellis": ("llama-80", PROMPTS, {"bits": 2.5, "code": "trellis"}, nothing),
    "trellis for one side": ("mimo-v2", PROMPTS, {"value_bits": 8, "code": "trellis"}, nothing),
}


@pytest.mark.parametrize("case", CASES)
def test_round_trip(case: str, tmp_path: Path) -> None:
    name, prompts, options, operation = CASES[case]
    data = batch(prompts)
    options = {"bits": 4, "recent_window": 0} | options
    cache = TurboQuantCache.for_model(tiny_model(name), **options)
    model = tiny_model(name, "sixfold" if cache.fused else "eager")
    forward(model, cache, data, 0, data.prompt)
    data = operation(cache, data)
    loaded = save_and_load(cache, model, tmp_path / "cache.sixfold")
    assert loaded.fused == cache.fused
    assert storage_bytes(loaded.tensors()) == loaded.nbytes
    if operation is not beams:  # whose rows shared pages
        assert loaded.nbytes <= cache.nbytes
    continues_alike(cache, loaded, model, data)


def test_an_empty_cache(tmp_path: Path) -> None:
    model, data = tiny_model("lfm2", "sixfold"), batch()
    cache = TurboQuantCache.for_model(model)
    loaded = save_and_load(cache, model, tmp_path / "cache")
    assert loaded.nbytes == 0
    assert torch.equal(
        forward(model, loaded, data, 0, data.prompt), forward(model, cache, data, 0, data.prompt)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    model, data = fresh_model("llama-64").to(dtype), batch()
    cache = TurboQuantCache.for_model(model, 3)
    forward(model, cache, data, 0, data.prompt)
    continues_alike(cache, save_and_load(cache, model, tmp_path / "cache"), model, data)


def test_a_cache_that_grew_and_a_dequantizing_one(tmp_path: Path) -> None:
    model, data = tiny_model("llama-64"), batch()
    cache = TurboQuantCache(model.config, 3, recent_window=0)
    for start in range(0, data.prompt, 62):
        forward(model, cache, data, start, start + 62)
    loaded = save_and_load(cache, model, tmp_path / "cache")
    assert loaded.fused
    same(loaded, cache)


def test_saving_again_gives_the_same_file(tmp_path: Path) -> None:
    model, data = tiny_model("gemma2", "sixfold"), batch()
    cache = TurboQuantCache.for_model(model)
    forward(model, cache, data, 0, data.prompt)
    cache.save(tmp_path / "first")
    TurboQuantCache.load(tmp_path / "first", model).save(tmp_path / "second")
    first, second = ((tmp_path / name).read_bytes() for name in ("first", "second"))
    assert header_of(first)["__metadata__"] == header_of(second)["__metadata__"]


# ---------------------------------------------------------------- refusals


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model, data = tiny_model("llama-64", "sixfold"), batch((150, 100))
    cache = TurboQuantCache.for_model(model, 2)
    forward(model, cache, data, 0, data.prompt)
    path = tmp_path / "cache.sixfold"
    cache.save(path)
    return path


def load(path: Path, **options: Any) -> TurboQuantCache:
    return TurboQuantCache.load(path, tiny_model("llama-64", "sixfold"), **options)


@pytest.mark.parametrize(
    ("model", "difference"),
    [
        (lambda: tiny_model("llama-80"), "head_dim"),
        (lambda: tiny_model("mistral"), "type"),
        (lambda: fresh_model("llama-64", num_hidden_layers=3), "layers"),
        (
            lambda: fresh_model(
                "llama-64", rope_parameters={"rope_type": "default", "rope_theta": 5.0}
            ),
            "rope_theta",
        ),
        (lambda: fresh_model("llama-64", rms_norm_eps=1e-2), "rms_norm_eps"),
        # Rotated by as much, of fewer coordinates.
        (
            lambda: fresh_model(
                "llama-64",
                rope_parameters={
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "partial_rotary_factor": 0.5,
                },
            ),
            "partial_rotary_factor",
        ),
    ],
)
def test_another_config(model: Callable[[], PreTrainedModel], difference: str, saved: Path) -> None:
    with pytest.raises(FormatError, match=f"another model.*{difference}"):
        TurboQuantCache.load(saved, model())


YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("name", "options", "changed", "difference"),
    [
        ("gemma2", {}, {"attn_logit_softcapping": 77.0}, "attn_logit_softcapping"),
        ("gpt2", {}, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn"),
        (
            "llama-64",
            {"rope_parameters": YARN},
            {"rope_parameters": {**YARN, "attention_factor": 4.0}},
            "attention_factor",
        ),
        (
            "llama-64",
            {"rope_parameters": {**YARN, "rope_type": "dynamic"}},
            {"max_position_embeddings": 64},
            "max_position_embeddings",
        ),
    ],
)
def test_what_is_no_weight_matters(
    name: str, options: dict[str, Any], changed: dict[str, Any], difference: str, tmp_path: Path
) -> None:
    model, data = fresh_model(name, **options), batch((150, 100))
    cache = TurboQuantCache.for_model(model)
    forward(model, cache, data, 0, data.prompt)
    cache.save(tmp_path / "cache")
    TurboQuantCache.load(tmp_path / "cache", fresh_model(name, **options))
    with pytest.raises(FormatError, match=f"another model.*{difference}"):
        TurboQuantCache.load(tmp_path / "cache", fresh_model(name, **{**options, **changed}))


def test_what_begins_like_what_does_not_matter(tmp_path: Path) -> None:
    """MuseSpark's `output_multiplier` scales what its routers read."""
    name = "MuseSparkForConditionalGeneration"
    model = build(architectures()[name], name, 1.5)
    cache = TurboQuantCache.for_model(model)
    with torch.no_grad():
        model(torch.randint(3, 90, (1, 150)), **cache_argument(cache))
    cache.save(tmp_path / "cache")
    config = copy.deepcopy(model.config)
    config.get_text_config().output_multiplier *= 20
    other = type(model)(config).eval()
    other.load_state_dict(model.state_dict())
    with pytest.raises(FormatError, match=r"another model.*output_multiplier"):
        TurboQuantCache.load(tmp_path / "cache", other)
    model.config.get_text_config().output_hidden_states = True
    TurboQuantCache.load(tmp_path / "cache", model)


@pytest.mark.parametrize("limit", [float("inf"), float("-inf"), float("nan")])
def test_numbers_of_a_config_that_json_lacks(limit: float, tmp_path: Path) -> None:
    model, data = fresh_model("llama-64"), batch((150, 100))
    # As Falcon-H1's `time_step_limit`.
    model.config.time_step_limit = (0.0, limit)
    cache = TurboQuantCache.for_model(model)
    forward(model, cache, data, 0, data.prompt)
    cache.save(tmp_path / "cache")
    TurboQuantCache.load(tmp_path / "cache", model)
    model.config.time_step_limit = (0.0, 1.0)
    with pytest.raises(FormatError, match=r"another model.*time_step_limit"):
        TurboQuantCache.load(tmp_path / "cache", model)


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"attention_dropout": 0.1},
        {"bos_token_id": 3},
        {"architectures": ["Other"]},
        {"initializer_range": 0.5},
        {"max_position_embeddings": 4096},
        {"a_note_of_a_trainer": "fixed"},
    ],
    ids=str,
)
def test_what_changes_no_key_is_not_compared(options: dict[str, Any], saved: Path) -> None:
    TurboQuantCache.load(saved, fresh_model("llama-64", **options))


def test_other_weights(saved: Path) -> None:
    model = fresh_model("llama-64")
    TurboQuantCache.load(saved, model)
    model.model.layers[1].self_attn.k_proj.weight.data[0, 0] += 1
    with pytest.raises(FormatError, match="other weights"):
        TurboQuantCache.load(saved, model)
    TurboQuantCache.load(saved, model, check_weights=False)


def test_truncation(saved: Path) -> None:
    data = saved.read_bytes()
    for length in [*range(0, len(data), len(data) // 50), len(data) - 1]:
        saved.write_bytes(data[:length])
        with pytest.raises(FormatError):
            load(saved)


def test_random_bit_flips(saved: Path) -> None:
    data = saved.read_bytes()
    generator = torch.Generator().manual_seed(0)
    header = 8 + struct.unpack("<Q", data[:8])[0]
    anywhere = torch.randint(8 * len(data), (100,), generator=generator).tolist()
    in_header = torch.randint(8 * header, (200,), generator=generator).tolist()
    for position in anywhere + in_header:
        damaged = bytearray(data)
        damaged[position // 8] ^= 1 << position % 8
        saved.write_bytes(damaged)
        with pytest.raises(FormatError):
            load(saved)
    saved.write_bytes(data)
    load(saved)


def test_foreign_files(tmp_path: Path) -> None:
    model = tiny_model("llama-64", "sixfold")
    with pytest.raises(IsADirectoryError):
        load(tmp_path)
    torch.save({"keys": torch.ones(3)}, tmp_path / "pickle")
    model.save_pretrained(tmp_path / "model")
    io.write_container(tmp_path / "index", "index", {}, {})
    (tmp_path / "empty").touch()
    for name in ("pickle", "model/model.safetensors", "index", "empty"):
        with pytest.raises(FormatError, match=Path(name).name):
            load(tmp_path / name)


def header_of(data: bytes) -> dict[str, Any]:
    header: dict[str, Any] = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    return header


def describe(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the description of a file, and leave its tensors."""
    data = path.read_bytes()
    header = header_of(data)
    description = json.loads(header["__metadata__"]["description"])
    change(description)
    header["__metadata__"]["description"] = json.dumps(description)
    text = json.dumps(header).encode()
    tail = data[8 + struct.unpack("<Q", data[:8])[0] :]
    path.write_bytes(struct.pack("<Q", len(text)) + text + tail)


@pytest.mark.parametrize("value", [None, -1, 10**12, 2.0, "2", [], True])
@pytest.mark.parametrize(
    "field",
    ["batch", "kv_heads", "key_dim", "value_dim", "window_tokens", "evicted", "sinks", "dtype"],
)
def test_a_description_that_does_not_fit_is_refused_before_anything_is_read(
    field: str, value: Any, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(description: dict[str, Any]) -> None:
        description["layers"][0][field] = value

    describe(saved, change)
    if (field, value) not in [("evicted", 10**12)]:
        monkeypatch.setattr(io.Container, "read", None)
    with pytest.raises(FormatError, match=r"cache.sixfold"):
        load(saved)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("layers"),
        lambda d: d.pop("model"),
        lambda d: d.update(model=3),
        lambda d: d.update(layers={}),
        lambda d: d.update(layers=5),
        lambda d: d["layers"].pop(),
        lambda d: d["layers"].append(d["layers"][0]),
        lambda d: d["layers"].__setitem__(0, None),
        lambda d: d["layers"][0].pop("policy"),
        lambda d: d["layers"][0].update(policy=None),
        lambda d: d["layers"][0]["policy"].update(key_bits=9),
        lambda d: d["layers"][0]["policy"].update(key_bits=3),
        lambda d: d["layers"][0]["policy"].update(seed=-1),
        lambda d: d["layers"][0]["policy"].update(unknown=1),
        lambda d: d["layers"][0]["policy"].update(code="huffman"),
        lambda d: d["layers"][0]["policy"].update(code=None),
        lambda d: d["layers"][0]["policy"].update(code=["trellis"]),
        lambda d: d["layers"][0].pop("page_lengths"),
        lambda d: d["layers"][0].update(page_lengths=[64, 64]),
        lambda d: d["layers"][0].update(page_lengths=[65]),
        lambda d: d["layers"][0].update(page_lengths=["64"]),
        lambda d: d["layers"][0].update(page_lengths=[]),
        lambda d: d["layers"][0].update(query_energy=True),
    ],
)
def test_a_damaged_description(
    change: Callable[[dict[str, Any]], Any], saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    describe(saved, change)
    monkeypatch.setattr(io.Container, "read", None)
    with pytest.raises(FormatError, match=r"cache.sixfold"):
        load(saved)


def test_a_layer_that_cannot_be_saved(tmp_path: Path) -> None:
    model = tiny_model("llama-64", "sixfold")
    cache = TurboQuantCache.for_model(model, skip_layers=[0])
    cache.layers[0] = type("Strange", (), {"is_initialized": True, "keys": torch.ones(1)})()
    with pytest.raises(SixfoldError, match="Strange"):
        cache.save(tmp_path / "cache")
    assert not list(tmp_path.iterdir())
