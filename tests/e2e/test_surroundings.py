"""What surrounds a call does not leak in: autocast, dtypes that change, hooks, wrappers."""

import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from sixfold import TurboQuantCache
from sixfold.errors import ShapeError, UnsupportedModelError
from sixfold.integrations.transformers.keyword import CACHE_KEYWORD, cache_argument
from sixfold.integrations.transformers.wrappers import unwrapped
from tests.e2e.decoding import Batch, batch, continue_decoding, decode, forward, relative_error
from tests.e2e.models import fresh_model
from tests.processes import printed
from tests.versions import traces_models

pytestmark = pytest.mark.usefixtures("unhooked")

BFLOAT16_TOLERANCE = 0.05  # two roundings of the model to 8 bits of mantissa differ by 0.02
STEPS = 12

both_modes = pytest.mark.parametrize("fused", [True, False], ids=["fused", "dequantized"])
halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def cache_for(model: PreTrainedModel, fused: bool, **options: Any) -> TurboQuantCache:
    options = {"bits": 8, "recent_window": 0, "fit_tokens": 0, **options}
    if fused:
        return TurboQuantCache.for_model(model, **options)
    return TurboQuantCache(model.config, **options)


def autocast(dtype: torch.dtype, enabled: bool = True) -> torch.autocast:
    return torch.autocast("cpu", dtype=dtype, enabled=enabled)


def uncompressed(model: PreTrainedModel, dtype: torch.dtype, data: Batch) -> Tensor:
    """What the model says under autocast with transformers' own cache and attention."""
    # Gemma 2 caps logits, and GPT-OSS has sinks, in eager attention alone.
    model.set_attn_implementation("eager")
    with autocast(dtype):
        return decode(model, DynamicCache(config=model.config), data)


# ---------------------------------------------------------------- autocast and dtypes


@both_modes
@halves
@pytest.mark.parametrize("name", ["llama-64", "gemma2", "gpt-oss", "mistral"])
def test_autocast(name: str, dtype: torch.dtype, fused: bool) -> None:
    model, data = fresh_model(name), batch(steps=STEPS)
    expected = uncompressed(model, dtype, data)
    cache = cache_for(model, fused)
    with autocast(dtype):
        logits = decode(model, cache, data)
    assert relative_error(logits, expected) < BFLOAT16_TOLERANCE
    # As small as the cache of a model of that dtype.
    windows = [layer.store.window for layer in cache.compressed_layers]
    assert {x.dtype for w in windows for x in (w.keys, w.values)} == {dtype}


@both_modes
def test_generate_under_autocast(fused: bool) -> None:
    model, data = fresh_model("llama-64"), batch((250, 180), steps=0)
    cache = cache_for(model, fused, bits=4)
    with autocast(torch.bfloat16):
        out = model.generate(
            data.ids,
            attention_mask=data.mask,
            **cache_argument(cache),
            max_new_tokens=4,
            do_sample=False,
        )
    assert out.shape[1] == data.prompt + 4
    assert cache.get_seq_length() == data.prompt + 3


@both_modes
@pytest.mark.parametrize("prefill_in_autocast", [True, False])
def test_autocast_may_come_and_go(fused: bool, prefill_in_autocast: bool) -> None:
    model, data = fresh_model("llama-64"), batch(steps=STEPS)
    model.set_attn_implementation("sdpa")
    expected = decode(model, DynamicCache(config=model.config), data)
    cache, rest = cache_for(model, fused), model_rest(data)
    with autocast(torch.bfloat16, prefill_in_autocast):
        forward(model, cache, data, 0, data.prompt)
    parts = []
    for start, inside in zip(rest, (not prefill_in_autocast, prefill_in_autocast), strict=True):
        with autocast(torch.bfloat16, inside):
            parts += [forward(model, cache, data, i, i + 1) for i in range(start, start + 6)]
    assert relative_error(torch.cat(parts, 1), expected) < BFLOAT16_TOLERANCE


def model_rest(data: Batch) -> tuple[int, int]:
    return data.prompt, data.prompt + STEPS // 2


def test_a_static_cache_under_autocast() -> None:
    model, data = fresh_model("llama-64"), batch((250, 250), steps=STEPS)
    expected = uncompressed(model, torch.bfloat16, data)
    cache = cache_for(model, True)
    forward(model, cache, data, 0, data.prompt)
    with autocast(torch.bfloat16):
        logits = continue_decoding(model, cache.static(400), data)
    assert relative_error(logits, expected) < BFLOAT16_TOLERANCE


def test_a_model_of_another_dtype_is_told_how_to_go_on() -> None:
    model, data = fresh_model("llama-64"), batch(steps=STEPS)
    cache = cache_for(model, True)
    forward(model, cache, data, 0, data.prompt)
    expected = continue_decoding(model, cache.fork(), data)
    model.bfloat16()
    with pytest.raises(ShapeError, match=r"cache\.to\(dtype=torch\.bfloat16\)"):
        continue_decoding(model, cache, data)
    cache.to(dtype=torch.bfloat16)
    logits = continue_decoding(model, cache, data)
    assert relative_error(logits, expected) < BFLOAT16_TOLERANCE


@pytest.mark.parametrize("skipped", [0, 1])
def test_a_layer_that_is_not_compressed_is_told_so_too(skipped: int) -> None:
    model, data = fresh_model("llama-64"), batch(steps=STEPS)
    cache = cache_for(model, True, skip_layers=[skipped])
    forward(model, cache, data, 0, data.prompt)
    expected = continue_decoding(model, cache.fork(), data)
    with autocast(torch.bfloat16):
        forward(model, cache.fork(), data, data.prompt, data.prompt + 1)
    model.bfloat16()
    with pytest.raises(ShapeError, match=r"cache\.to\(dtype=torch\.bfloat16\)"):
        continue_decoding(model, cache, data)
    assert cache.get_seq_length() == data.prompt
    cache.to(dtype=torch.bfloat16)
    forward(model, cache.fork(), data, data.prompt, data.prompt + 1)
    # More exact than what is held is no loss.
    logits = continue_decoding(model.float(), cache, data)
    assert relative_error(logits, expected) < BFLOAT16_TOLERANCE


@both_modes
@pytest.mark.parametrize(
    ("of_file", "of_model"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)],
    ids=str,
)
def test_a_file_for_a_model_of_another_dtype(
    of_file: torch.dtype, of_model: torch.dtype, fused: bool, tmp_path: Path
) -> None:
    model, data = fresh_model("llama-64").to(of_file), batch(steps=STEPS)
    cache = cache_for(model, True)
    forward(model, cache, data, 0, data.prompt)
    cache.save(tmp_path / "x.sixfold")
    expected = continue_decoding(model, cache, data)
    # Other roundings of the same weights.
    loaded = TurboQuantCache.load(tmp_path / "x.sixfold", model.to(of_model), check_weights=False)
    if not fused:
        model.set_attn_implementation("sdpa")
        for layer in loaded.compressed_layers:
            layer.fused = False
    assert relative_error(continue_decoding(model, loaded, data), expected) < BFLOAT16_TOLERANCE


# ---------------------------------------------------------------- compilation


@torch.no_grad()
def largest_difference(fused: bool) -> float:
    """How far compiled steps, prefill included, are from the same without compiling.

    As a share of what codes cost: where compiled products round otherwise (those of some processors
    do), the code of a coordinate beside a boundary may be its neighbour.
    """
    model = fresh_model("llama-64")
    model.set_attn_implementation("sdpa")
    data = batch((150, 150), steps=STEPS)

    def logits(forward: Any, cache: Cache) -> Tensor:
        out, starts = [], [0, *range(data.prompt, data.ids.shape[1])]
        for start, stop in zip(starts, [*starts[1:], data.ids.shape[1]], strict=True):
            ids = data.ids[:, start:stop]
            out.append(forward(input_ids=ids, **cache_argument(cache), use_cache=True).logits)
        return torch.cat(out, 1)

    compiled = torch.compile(model.forward, backend="aot_eager")
    exact = logits(model.forward, DynamicCache())
    expected = logits(model.forward, cache_for(model, fused, bits=4))
    found = logits(compiled, cache_for(model, fused, bits=4))
    return float((found - expected).abs().max() / (expected - exact).abs().max())


@traces_models
@pytest.mark.parametrize("fused", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_compiled_model_with_a_growing_cache(fused: bool) -> None:
    code = f"from tests.e2e.test_surroundings import largest_difference as d; print(d({fused}))"
    # Another key map, or a token that is not read, costs as much as the codes do.
    assert float(printed(code)[-1]) < 0.05


@torch.no_grad()
def refusal_without_breaks(static: bool) -> str:
    """What torch.compile says where it may not interrupt the graph."""
    model, data = fresh_model("llama-64"), batch((150, 150), steps=STEPS)
    cache = cache_for(model, True, bits=4)
    forward(model, cache, data, 0, data.prompt)
    step = torch.compile(model.forward, backend="eager", fullgraph=True)
    held = cache.static(300) if static else cache
    position = torch.full((2, 1), data.prompt)
    try:
        step(data.ids[:, -1:], **cache_argument(held), position_ids=position, use_cache=True)
    except torch._dynamo.exc.Unsupported as error:
        return str(error)
    return "nothing"


@traces_models
@pytest.mark.parametrize(
    ("static", "advice"), [(True, "SIXFOLD_BACKEND=reference"), (False, "cache.static(max_tokens)")]
)
def test_what_cannot_be_traced_says_why(static: bool, advice: str) -> None:
    if static:
        pytest.importorskip("sixfold._cpu")
    code = (
        f"from tests.e2e.test_surroundings import refusal_without_breaks as r; print(r({static}))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "SIXFOLD_BACKEND"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env=environment | {"JAXTYPING_DISABLE": "1"},
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "without fullgraph=True" in done.stdout
    assert advice in done.stdout


@torch.no_grad()
def test_tools_that_look_at_a_handle_find_nothing() -> None:
    """Inspection is not use: what Python looks for of its own accord is simply not there."""
    model = fresh_model("llama-64")
    cache = TurboQuantCache.for_model(model)
    keys, values = cache.update(torch.zeros(1, 2, 3, 64), torch.zeros(1, 2, 3, 64), 0)
    for handle in (keys, values):
        assert not hasattr(handle, "__array_interface__")
        assert not hasattr(handle, "__cuda_array_interface__")
        assert copy.copy(handle).store is handle.store
    assert cache.get_seq_length() == 3


# ---------------------------------------------------------------- hooks and devices


def accelerate() -> Any:
    return pytest.importorskip("accelerate")


@both_modes
def test_offloaded_weights(fused: bool) -> None:
    library, model, data = accelerate(), fresh_model("llama-64"), batch((150,), steps=STEPS)
    expected = decode(model, cache_for(model, fused), data)
    library.cpu_offload(model)
    assert next(model.parameters()).device.type == "meta"
    assert torch.equal(decode(model, cache_for(model, fused), data), expected)


@both_modes
def test_hosts_that_move_every_argument(fused: bool) -> None:
    """They call `.to` with what they call tensors with, None included."""
    model, data = fresh_model("llama-64"), batch(steps=STEPS)
    cache = cache_for(model, fused)
    forward(model, cache, data, 0, data.prompt)
    expected = continue_decoding(model, cache.fork(), data)
    assert cache.to(None) is cache
    assert cache.to("cpu", non_blocking=True) is cache
    assert cache.to(device=torch.device("cpu")) is cache
    assert torch.equal(continue_decoding(model, cache, data), expected)


@pytest.mark.gpu
@both_modes
def test_layers_on_several_devices(fused: bool) -> None:
    """A layer is where its tokens come from, also when it held some elsewhere."""
    library, model, data = accelerate(), fresh_model("llama-64"), batch((150,), steps=STEPS)
    cache = cache_for(model, fused)
    forward(model, cache, data, 0, data.prompt)
    expected = continue_decoding(model, cache.fork(), data)
    places = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cpu"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    library.dispatch_model(model, places, main_device=0, skip_keys=CACHE_KEYWORD)
    logits = continue_decoding(model, cache, data)
    assert relative_error(logits.cpu(), expected) < 0.01
    devices = [layer.store.padding.device.type for layer in cache.compressed_layers]
    assert devices == ["cuda", "cpu"]


# ---------------------------------------------------------------- what models ask a cache


ASKED = ("is_initialized", "is_sliding", "is_compileable", "is_croppable", "get_seq_length")


def answers(cache: Any) -> dict[str, Any]:
    """What a cache answers, and each of its layers that holds keys and values."""
    found = {name: getattr(cache, name) for name in ASKED}
    found["layers"] = [
        (layer.is_initialized, getattr(layer, "dtype", None), getattr(layer, "device", None))
        for layer in cache.layers
        if layer.supports_early_init or hasattr(layer, "store")
    ]
    return {name: value() if callable(value) else value for name, value in found.items()}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "dequantized"])
@pytest.mark.parametrize("name", ["llama-64", "gemma3", "qwen3-next", "lfm2", "gpt2"])
def test_a_cache_answers_as_an_uncompressed_one(name: str, fused: bool) -> None:
    """Some models, such as PaliGemma, tell the prompt from what follows by that."""
    model, data = fresh_model(name), batch((150,), steps=STEPS)
    make = TurboQuantCache.for_model if fused else lambda m, b: TurboQuantCache(m.config, b)
    caches = DynamicCache(config=model.config), make(model, 8)
    for start, stop in ((0, 0), (0, 20), (20, data.prompt)):
        for cache in caches:
            if stop:
                forward(model, cache, data, start, stop)
        dense, ours = map(answers, caches)
        assert ours == dense
    for cache in caches:
        cache.reset()
    assert caches[1].is_initialized == caches[0].is_initialized


# ---------------------------------------------------------------- wrappers


@dataclasses.dataclass
class Adapters:
    """Stands for what PEFT does where it is not installed."""

    model: PreTrainedModel

    def wrap(self) -> torch.nn.Module:
        wrapper = torch.nn.Module()
        wrapper.base = self.model
        wrapper.get_base_model = lambda: self.model
        return wrapper


def peft(model: PreTrainedModel) -> torch.nn.Module:
    library = pytest.importorskip("peft")
    config = library.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    return library.get_peft_model(model, config)


def mixed_peft(model: PreTrainedModel) -> torch.nn.Module:
    """With adapters of two kinds."""
    library = pytest.importorskip("peft")
    low_rank = library.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    wrapped = library.get_peft_model(model, low_rank, mixed=True)
    wrapped.add_adapter("second", library.LoHaConfig(target_modules=["v_proj"]))
    wrapped.set_adapter(["default", "second"])
    return wrapped


class Tuner(torch.nn.Module):
    """Stands for what holds a model that has adapters of two kinds."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model


class Mixed(torch.nn.Module):
    """Stands for PEFT's wrapper of such a model."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.base_model = Tuner(model)


class Quanto:
    """As optimum-quanto's wrapper: no module, and whatever it lacks the model is asked for."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._wrapped = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_wrapped"], name)


class ValueHead(torch.nn.Module):
    """As trl's models."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.pretrained_model = model


WRAPPERS = {
    "quanto": Quanto,
    "trl": ValueHead,
    "adapters": lambda model: Adapters(model).wrap(),
    "peft": peft,
    "mixed adapters": Mixed,
    "mixed peft": mixed_peft,
    "peft's tuner": lambda model: peft(model).base_model,
    "compiled": torch.compile,
    "parallel": torch.nn.DataParallel,
    "compiled peft": lambda model: torch.compile(peft(model)),
    "accelerate": lambda model: accelerate().Accelerator(cpu=True).prepare(model),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
@pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)
def test_wrapped_models(wrap: Any, tmp_path: Path) -> None:
    model, data = fresh_model("llama-64"), batch((150,), steps=STEPS)
    wrapped = wrap(model)
    cache = TurboQuantCache.for_model(wrapped, bits=8)
    assert cache.fused
    assert model.config._attn_implementation == "sixfold"
    forward(model, cache, data, 0, data.prompt)
    cache.save(tmp_path / "x.sixfold")
    loaded = TurboQuantCache.load(tmp_path / "x.sixfold", wrapped)
    expected = continue_decoding(model, cache, data)
    assert torch.equal(continue_decoding(model, loaded, data), expected)


@pytest.mark.parametrize("wrap", [Quanto, torch.compile])
def test_the_model_within_is_all_of_it_where_adapters_were_loaded_into_it(wrap: Any) -> None:
    """Such wrappers have the names of their model, `peft_config` and `model` among them."""
    model = fresh_model("llama-64")
    model.peft_config = {}
    assert unwrapped(wrap(model)) is model


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_learned_keys_and_values_are_refused() -> None:
    """PEFT would put its own cache in the place of ours, and drop ours without a word."""
    library, model = pytest.importorskip("peft"), fresh_model("llama-64")
    config = library.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
    wrapped = library.get_peft_model(model, config)
    with pytest.raises(UnsupportedModelError, match=r"cache of its own.*from_cache"):
        TurboQuantCache.for_model(wrapped)
    TurboQuantCache.for_model(wrapped.get_base_model())


def test_a_wrapper_of_itself_is_refused() -> None:
    wrapper = torch.nn.Linear(2, 2)
    wrapper.get_base_model = lambda: wrapper
    with pytest.raises(UnsupportedModelError, match="got Linear"):
        TurboQuantCache.for_model(wrapper)


def test_a_wrapper_without_a_model_is_named() -> None:
    wrapped = torch.nn.DataParallel(torch.nn.Linear(2, 2))
    with pytest.raises(UnsupportedModelError, match="got DataParallel"):
        TurboQuantCache.for_model(wrapped)
