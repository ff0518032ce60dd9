"""A forward pass that stops between layers: the cache refuses to go on wrongly, and recovers."""

import pickle
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from sixfold import TurboQuantCache
from sixfold.errors import OutOfRangeError, SixfoldError, UnsupportedModelError
from sixfold.integrations.transformers.combined import held_beside
from sixfold.integrations.transformers.keyword import cache_argument
from sixfold.integrations.transformers.layer import TurboQuantLayer
from tests.e2e.decoding import Batch, batch, continue_decoding, forward, relative_error
from tests.e2e.models import ARCHITECTURES, WINDOW, fresh_model
from tests.processes import printed
from tests.versions import traces_models
from tools.sweep_architectures import architectures, build

pytestmark = pytest.mark.usefixtures("unhooked", "exact_arithmetic")

SEEN = 200

both_modes = pytest.mark.parametrize("fused", [True, False], ids=["fused", "dequantized"])


class Stopped(Exception):
    """What interrupts: a signal, a lack of memory, somebody's hook."""


def stop(*_: Any) -> None:
    raise Stopped


def cache_for(model: PreTrainedModel, fused: bool, **options: Any) -> TurboQuantCache:
    if fused:
        return TurboQuantCache.for_model(model, bits=8, **options)
    model.set_attn_implementation("eager")
    return TurboQuantCache(model.config, bits=8, **options)


def interrupted(model: PreTrainedModel, layer: int, *run: Any) -> None:
    """A forward pass that `layer` never begins."""
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


def test_a_pass_repeated_while_a_layer_waits_is_refused_and_recovered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The refusal leaves it waiting: compressed, it would have let go of what left its window."""
    model = fresh_model("mistral", attn_implementation="sdpa")
    data, seen = batch((560, 560), steps=6), 100
    cache = TurboQuantCache(model.config, bits=8)
    forward(model, cache, data, 0, seen)
    update = cache.update

    def stop_unattended(*tokens: Any) -> None:
        update(*tokens)
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(cache, "update", stop_unattended)
        with pytest.raises(Stopped):
            forward(model, cache, data, seen, data.prompt)
    assert data.prompt - seen > WINDOW
    for _ in range(2):
        with pytest.raises(SixfoldError, match=r"interrupted.*cache\.recover\(\)"):
            forward(model, cache, data, seen, data.prompt)
    assert cache.recover() == seen
    assert lengths(cache) == [seen] * 2


@both_modes
@pytest.mark.parametrize("after", ["between layers", "the last layer"])
def test_recovery_to_what_was_held_before(fused: bool, after: str) -> None:
    model, data = fresh_model("llama-64"), batch((248, 248), steps=6)
    cache = cache_for(model, fused)
    forward(model, cache, data, 0, SEEN)
    untouched = cache.fork()
    before = cache.get_seq_length()
    place = model.lm_head if after == "the last layer" else model.model.layers[1]
    hook = place.register_forward_pre_hook(stop)
    with pytest.raises(Stopped):
        forward(model, cache, data, SEEN, data.prompt)
    hook.remove()
    with pytest.raises(OutOfRangeError, match=r"tokens must be at most the \d+"):
        cache.recover(data.prompt + 1)
    assert cache.recover(before) == before
    assert lengths(cache) == [before] * 2
    logits, expected = (forward(model, x, data, SEEN, data.prompt) for x in (cache, untouched))
    assert relative_error(logits, expected) < 1e-3
    assert cache.recover(0) == 0
    assert lengths(cache) == [0, 0]


def test_states_of_a_finished_pass_are_not_recovered() -> None:
    model, data = fresh_model("qwen3-next"), batch((248, 248), steps=0)
    cache = cache_for(model, fused=True)
    forward(model, cache, data, 0, SEEN)
    forward(model, cache, data, SEEN, data.prompt)
    with pytest.raises(SixfoldError, match="recurrent state"):
        cache.recover(SEEN)
    assert cache.get_seq_length() == data.prompt


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


HYBRIDS = {
    # States of layers of their own, before and after attention; or beside it in one layer.
    "lfm2": 2,
    "qwen3-next": 1,
    "BambaForCausalLM": 3,
    "Zamba2ForCausalLM": 3,
    "FalconH1ForCausalLM": 1,
}


# With two states a layer, or with an indexer.
OTHERS = ("JambaForCausalLM", "DeepseekV32ForCausalLM")


def hybrid(name: str) -> PreTrainedModel:
    if name in ARCHITECTURES:
        return fresh_model(name)
    model_type = architectures().get(name)
    if model_type is None:
        pytest.skip(f"{name} is younger than this transformers")
    return build(model_type, name, 1.0)


@torch.no_grad()
def steps_of(model: PreTrainedModel, cache: Cache, *steps: Tensor) -> Tensor:
    """Logits of the last."""
    return [model(ids, **cache_argument(cache)).logits for ids in steps][-1]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    ("name", "layer", "last"),
    [
        *((name, layer, [7, 8]) for name, count in HYBRIDS.items() for layer in range(count)),
        # Of a window over equal tokens most stays as it is while it moves on.
        *(("lfm2", layer, last) for layer in range(2) for last in ([7, 7, 9], [9, 9, 9])),
    ],
)
def test_states_that_a_step_changes_in_place(
    name: str, layer: int, last: list[int], mode: Any
) -> None:
    """Nobody tells the cache: with one token a model writes to the states that it was given."""
    model, ids = hybrid(name), torch.arange(2, 42).repeat(2, 1)
    tokens, cache = torch.tensor([last, last]), cache_for(model, True)
    before, one = (ids, *tokens.split(1, 1)), ids[:, 9:10]

    with mode():
        steps_of(model, cache, *before)
        hook = model.get_decoder().layers[layer].register_forward_hook(stop)
        with pytest.raises(Stopped):
            steps_of(model, cache, one)
        hook.remove()
        # What recorded its past can be cropped, but to what nobody knows.
        cache.activate_past_recording()
        for attempt in (
            steps_of,
            lambda *_: cache.save("never"),
            lambda *_: cache.crop(0),
            lambda *_: cache.crop(-1),
        ):
            with pytest.raises(SixfoldError, match=r"interrupted|crop|a state beside|recurrent"):
                attempt(model, cache, one)
        with pytest.raises(SixfoldError, match=r"reset the cache|a state beside its attention"):
            cache.recover()
        cache.reset()
        again, fresh = steps_of(model, cache, *before), cache_for(model, True)
        assert torch.equal(again, steps_of(model, fresh, *before))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", HYBRIDS)
def test_a_second_turn_after_decoding(name: str, mode: Any) -> None:
    """Passes of one token, which change states in place, and of several, which replace them."""
    model, ids = hybrid(name), torch.arange(2, 42).repeat(2, 1)
    one, cache, other = ids[:, :1], cache_for(model, True), DynamicCache(config=model.config)
    turns = (ids, one, one, ids[:, :7], one, ids[:, :2], one)
    with mode():
        found = steps_of(model, cache, *turns)
        assert cache.recover() == sum(turn.shape[1] for turn in turns)
        expected = steps_of(model, other, *turns)
    assert relative_error(found, expected) < 0.1


@pytest.mark.parametrize("then", ["again", "recover"])
@pytest.mark.parametrize("tokens", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "name", ["lfm2", *(pytest.param(x, marks=pytest.mark.slow) for x in [*HYBRIDS, *OTHERS])]
)
def test_a_pass_that_stops_anywhere(name: str, mode: Any, tokens: int, then: str) -> None:
    """Before or after any module: it cannot be repeated, or rightly so, or was over."""
    model, ids = hybrid(name), torch.arange(2, 42).repeat(2, 1)
    new = ids[:, 9 : 9 + tokens]
    with mode():
        begun = cache_for(model, fused=not name.startswith("Deepseek"))
        steps_of(model, begun, ids, *ids[:, 7:9].split(1, 1))
        expected, outcomes = steps_of(model, done := begun.fork(), new), Counter[str]()
        for module in list(model.modules())[1:]:
            for register in (module.register_forward_pre_hook, module.register_forward_hook):
                cache, hook = begun.fork(), register(stop)
                stopped = stops(model, cache, new)
                hook.remove()
                if stopped and not same_contents(cache, done):
                    untouched = same_contents(cache, begun)
                    found = repeated(model, cache, new, expected, then == "recover")
                    outcomes[f"untouched, {found}" if untouched else found] += 1
    # Tokens can be taken back, states cannot.
    went = "right" if then == "recover" and name.startswith("Deepseek") else "refused"
    assert outcomes.keys() == {"untouched, right", went}, outcomes


def stops(model: PreTrainedModel, cache: TurboQuantCache, ids: Tensor) -> bool:
    try:
        steps_of(model, cache, ids)
    except Stopped:
        return True
    return False


def same_contents(a: TurboQuantCache, b: TurboQuantCache) -> bool:
    """Whether both have seen as many tokens, and have the same states."""
    return all(
        held.keys() == other.keys() and all(torch.equal(held[name], other[name]) for name in held)
        for held, other in zip(map(held_of, a.layers), map(held_of, b.layers), strict=True)
    )


def held_of(layer: Any) -> dict[str, Tensor]:
    store = layer.store if isinstance(layer, TurboQuantLayer) else None
    return {"tokens": torch.tensor(store.length if store else 0), **held_beside(layer)}


def repeated(
    model: PreTrainedModel, cache: TurboQuantCache, ids: Tensor, expected: Tensor, recover: bool
) -> str:
    """What comes of a pass that has stopped and is called again."""
    try:
        if recover:
            cache.recover()
        found = steps_of(model, cache, ids)
    except SixfoldError:
        return "refused"
    return "right" if relative_error(found, expected) < 1e-5 else "wrong"


@torch.no_grad()
def compiled_and_not(name: str) -> str:
    """Passes of which some are compiled, and one of those that is interrupted."""
    model, ids = hybrid(name), torch.arange(2, 42).repeat(2, 2)
    compiled = torch.compile(model, backend="eager")
    cache, plain, seen = cache_for(model, True), cache_for(model, True), 0
    for run, count in ((compiled, 20), (model, 1), (compiled, 1), (model, 3), (compiled, 1)):
        new = ids[:, seen : seen + count]
        if relative_error(steps_of(run, cache, new), steps_of(model, plain, new)) > 1e-4:
            return f"wrong after {seen} tokens"
        seen += count
    cache.compressed_layers[0].update = stop
    if not stops(compiled, cache, new):
        return "not interrupted"
    del cache.compressed_layers[0].update
    return repeated(compiled, cache, new, new, recover=False)


@traces_models
def test_states_count_in_traced_frames() -> None:
    model, ids = fresh_model("lfm2"), torch.arange(2, 42).repeat(2, 1)
    cache = cache_for(model, True)
    steps_of(model, cache, ids)
    state = cache.get_conv_state(0).clone()
    update = torch.compile(lambda x: cache.update_conv_state(x, 0), backend="eager")
    with torch.no_grad():
        update(state[..., -1:])
    with pytest.raises(SixfoldError, match="interrupted"):
        steps_of(model, cache, ids[:, :1])


@traces_models
@pytest.mark.slow
@pytest.mark.parametrize("name", ["lfm2", "Zamba2ForCausalLM"])
def test_states_of_compiled_passes(name: str) -> None:
    code = f"from tests.e2e.test_interrupted import compiled_and_not as c; print(c({name!r}))"
    assert printed(code) == ["refused"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", HYBRIDS)
def test_states_that_are_looked_at_between_steps(name: str, mode: Any) -> None:
    """By a user, while sequences are reordered, and by copies that go on from there."""
    model, ids = hybrid(name), torch.arange(2, 42).repeat(2, 1)
    one, cache = ids[:, :1], cache_for(model, True)
    with mode():
        steps_of(model, cache, ids, one)
        expected = steps_of(model, cache.fork(), one, one)
        copied = pickle.loads(pickle.dumps(cache))
        assert relative_error(steps_of(model, copied, one, one), expected) < 1e-5
        for _ in range(2):
            for index, layer in enumerate(cache.layers):
                for number in getattr(layer, "has_previous_state", {}):
                    cache.get_conv_state(index, number)
                    cache.get_recurrent_state(index, number)
            cache.reorder_cache(torch.tensor([1, 0]))
            found = steps_of(model, cache, one)
    assert cache.recover() == ids.shape[1] + 3
    assert relative_error(found, expected) < 1e-5


OPERATIONS = {
    "batch_select_indices": torch.tensor([1, 0]),
    "reorder_cache": torch.tensor([1, 0]),
    "batch_repeat_interleave": 2,
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", ["llama-64", "lfm2"])
def test_an_operation_that_stops_between_layers(
    name: str, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers of equally many sequences look alike, in whatever order these are."""
    model, ids = fresh_model(name), torch.arange(2, 42).repeat(2, 1)
    cache = cache_for(model, True)
    steps_of(model, cache, ids)
    attention = cache.compressed_layers[-1]
    monkeypatch.setattr(attention, operation, stop)
    with pytest.raises(Stopped):
        getattr(cache, operation)(OPERATIONS[operation])
    monkeypatch.undo()
    for attempt in (
        lambda: steps_of(model, cache, ids[:, :1]),
        lambda: cache.save("never"),
        lambda: cache.crop(-1) if name == "llama-64" else cache.fork(),
        cache.fork,
        cache.recover,
        lambda: getattr(cache, operation)(OPERATIONS[operation]),
    ):
        with pytest.raises(SixfoldError, match=f"{operation} was interrupted"):
            attempt()
    cache.reset()
    fresh = cache_for(model, True)
    assert torch.equal(steps_of(model, cache, ids), steps_of(model, fresh, ids))


@both_modes
@pytest.mark.parametrize("operation", ["crop", "recover"])
def test_tokens_that_some_layers_have_taken_back(
    operation: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No pass may fill up what is missing with others; taking back can be completed."""
    model, ids = fresh_model("llama-64"), torch.arange(2, 42).repeat(2, 2)
    cache = cache_for(model, fused)
    steps_of(model, cache, ids[:, :40])
    expected = steps_of(model, cache.fork(), ids[:, 40:60])
    steps_of(model, cache, ids[:, 60:70])
    if operation == "recover":
        hook = model.model.layers[1].register_forward_pre_hook(stop)
        assert stops(model, cache, ids[:, 60:70])
        hook.remove()
        cache.layers[1].crop(-10)
    last = cache.layers[1] if operation == "crop" else cache.layers[0]
    monkeypatch.setattr(last, "crop", stop)
    with pytest.raises(Stopped):
        cache.crop(-10) if operation == "crop" else cache.recover()
    monkeypatch.undo()
    for attempt in (lambda: steps_of(model, cache, ids[:, 40:60]), cache.fork):
        with pytest.raises(SixfoldError, match=rf"{operation} was interrupted.*cache\.recover\(\)"):
            attempt()
    assert cache.recover() == 40
    assert relative_error(steps_of(model, cache, ids[:, 40:60]), expected) < 1e-5


def test_states_that_some_layers_have_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths do not tell what a convolution has let go of."""
    model, ids = fresh_model("lfm2"), torch.arange(2, 42).repeat(2, 1)
    cache = cache_for(model, True)
    cache.activate_past_recording()
    steps_of(model, cache, ids, ids[:, :4])
    monkeypatch.setattr(cache.compressed_layers[0], "crop", stop)
    with pytest.raises(Stopped):
        cache.crop(-3)
    monkeypatch.undo()
    for attempt in (lambda: steps_of(model, cache, ids[:, :1]), cache.recover, cache.fork):
        with pytest.raises(SixfoldError, match=r"crop was interrupted.*cache\.reset\(\)"):
            attempt()


def test_a_reset_that_stops_between_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = fresh_model("llama-64"), torch.arange(2, 42).repeat(2, 1)
    cache = cache_for(model, True)
    steps_of(model, cache, ids)
    monkeypatch.setattr(cache.layers[1], "reset", stop)
    with pytest.raises(Stopped):
        cache.reset()
    monkeypatch.undo()
    for attempt in (lambda: steps_of(model, cache, ids), cache.recover):
        with pytest.raises(SixfoldError, match=r"reset was interrupted.*cache\.reset\(\)"):
            attempt()
    cache.reset()
    fresh = cache_for(model, True)
    assert torch.equal(steps_of(model, cache, ids), steps_of(model, fresh, ids))


@pytest.mark.parametrize("name", ["lfm2", "qwen3-next", "FalconH1ForCausalLM"])
@pytest.mark.parametrize("how", ["load", "pickle", "fork", "select", "reorder", "repeat", "from"])
def test_states_copied_in_inference_mode(name: str, how: str, tmp_path: Path) -> None:
    """Such copies may be changed in place outside of it."""
    model, ids = hybrid(name), torch.arange(2, 42).repeat(2, 1)
    one, cache = ids[:, :1], cache_for(model, True)
    steps_of(model, cache, ids)
    expected = steps_of(model, cache.fork(), one, one)
    with torch.inference_mode():
        if how == "load":
            cache.save(tmp_path / "x")
            cache = TurboQuantCache.load(tmp_path / "x", model)
        elif how == "pickle":
            cache = pickle.loads(pickle.dumps(cache))
        elif how == "fork":
            cache = cache.fork()
        elif how == "select":
            cache.batch_select_indices(torch.tensor([0, 1]))
        elif how == "reorder":
            cache.reorder_cache(torch.tensor([0, 1]))
        elif how == "repeat":
            cache.batch_repeat_interleave(1)
        else:
            dense = DynamicCache(config=model.config)
            model.set_attn_implementation("eager")
            steps_of(model, dense, ids)
            cache = TurboQuantCache.from_cache(dense, model, 8)
    assert relative_error(steps_of(model, cache, one, one), expected) < 1e-4
    cache.reset()
    steps_of(model, cache, ids, one)
    assert cache.get_seq_length() == ids.shape[1] + 1


def test_a_cache_filled_in_inference_mode_is_used_again() -> None:
    model, ids = fresh_model("lfm2"), torch.arange(2, 42).repeat(2, 1)
    cache, fresh = cache_for(model, True), cache_for(model, True)
    with torch.inference_mode():
        steps_of(model, cache, ids)
    cache.reset()
    both = [steps_of(model, one, ids, ids[:, :1]) for one in (cache, fresh)]
    assert torch.equal(*both)


def test_states_that_a_model_keeps_in_itself(tmp_path: Path) -> None:
    model, ids = hybrid("RecurrentGemmaForCausalLM"), torch.arange(2, 42).repeat(2, 1)
    cache = cache_for(model, True)
    steps_of(model, cache, ids)
    for operation in (
        cache.fork,
        cache.recover,
        lambda: cache.crop(-1),
        lambda: cache.save(tmp_path / "x"),
        lambda: pickle.dumps(cache),
        *(partial(getattr(cache, name), value) for name, value in OPERATIONS.items()),
    ):
        with pytest.raises(UnsupportedModelError, match="'recurrent_gemma' keep the states"):
            operation()
    cache.reset()
    again, fresh = steps_of(model, cache, ids, ids[:, :1]), cache_for(model, True)
    assert torch.equal(again, steps_of(model, fresh, ids, ids[:, :1]))


@pytest.mark.parametrize("kept", [slice(None), slice(1)], ids=["all", "first"])
@pytest.mark.parametrize("name", ["FalconH1ForCausalLM", "DeepseekV32ForCausalLM"])
def test_layers_kept_uncompressed_that_hold_more_count(name: str, kept: slice) -> None:
    """Transformers' own layers with states or an indexer beside keys and values."""
    model, ids = hybrid(name), torch.arange(2, 42).repeat(2, 1)
    model.set_attn_implementation("eager")
    layers = range(len(TurboQuantCache(model.config, 8).layers))
    cache = TurboQuantCache(model.config, 8, skip_layers=layers[kept])
    steps_of(model, cache, ids)
    assert cache.recover() == ids.shape[1]
    assert lengths(cache) == [ids.shape[1]] * len(layers)
    hook = model.get_decoder().layers[1].register_forward_pre_hook(stop)
    with pytest.raises(Stopped):
        steps_of(model, cache, ids)
    hook.remove()
    with pytest.raises(SixfoldError, match="interrupted"):
        steps_of(model, cache, ids)
    try:
        assert cache.recover() == ids.shape[1]
    except SixfoldError:
        assert name.startswith("Falcon")
        cache.reset()
    fresh = TurboQuantCache(model.config, 8, skip_layers=layers[kept])
    for one in (fresh,) if cache.get_seq_length() else (fresh, cache):
        steps_of(model, one, ids)
    found, expected = (steps_of(model, one, ids[:, :1]) for one in (cache, fresh))
    assert relative_error(found, expected) < 1e-5


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


def prefilled() -> tuple[PreTrainedModel, Batch, TurboQuantCache]:
    model, data = fresh_model("llama-64"), batch((248, 248), steps=6)
    cache = cache_for(model, fused=True)
    forward(model, cache, data, 0, data.prompt)
    return model, data, cache


@torch.no_grad()
def test_a_static_cache_after_an_interrupted_step() -> None:
    model, data, growing = prefilled()
    cache = growing.static(300)
    forward(model, cache, data, 248, 249)
    interrupted(model, 1, cache, data, 249, 250)
    with pytest.raises(SixfoldError, match=r"has not reached all layers.*\.static\(max_tokens\)"):
        forward(model, cache, data, 249, 250)
    for going_back in (cache.recover, cache.reset):
        with pytest.raises(SixfoldError, match=r"call \.static\(max_tokens\) again"):
            going_back()


@pytest.mark.compile
@traces_models
@pytest.mark.filterwarnings("ignore:.*Dynamo detected a call")
@torch.no_grad()
def test_a_compiled_static_step_that_was_interrupted() -> None:
    model, data, growing = prefilled()
    cache = growing.static(300)

    @torch.compile(backend="eager")
    def step(at: int) -> Tensor:
        ids, positions = data.ids[:, at : at + 1], torch.tensor([[at]])
        logits: Tensor = model(ids, **cache_argument(cache), position_ids=positions).logits
        return logits

    stopping = True

    @torch.compiler.disable
    def check(*_: Any) -> None:
        if stopping:
            raise Stopped

    model.model.layers[1].register_forward_pre_hook(check)
    with pytest.raises(Stopped):
        step(248)
    stopping = False
    with pytest.raises(RuntimeError, match=r"interrupted between layers.*\.static\(max_tokens\)"):
        step(248)
    cache = growing.static(300)
    expected = growing.fork()
    logits = [step(248), forward(model, expected, data, 248, 249)]
    assert relative_error(*logits) < 0.03


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
    # What was seen before may be had again.
    before = cache.get_seq_length()
    assert cache.recover(before) == before
    assert cache.recover(before - 2) == before - 2
    assert lengths(cache) == [before - 2, 0]


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


def test_a_static_cache_refuses_gradients_of_keys_and_values() -> None:
    """Of a model whose queries need none: they would be lost without a word."""
    model = fresh_model("llama-64").requires_grad_(False)
    model.lm_head.weight.requires_grad_()
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight.requires_grad_()
    data = batch((248, 248), steps=2)
    cache = cache_for(model, fused=True)
    with torch.no_grad():
        forward(model, cache, data, 0, SEEN)
    static = cache.static(400)
    logits = model(data.ids[:, SEEN : SEEN + 1], **cache_argument(static)).logits
    with pytest.raises(SixfoldError, match="a static cache computes no gradients"):
        logits.sum().backward()
