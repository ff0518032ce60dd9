"""One side of one layer at a time: only that side is coarse, and only it costs."""

import pytest
import torch

from sixfold.eval.embedded import haystack
from sixfold.eval.perplexity import windows_of
from sixfold.eval.sensitivity import Sensitivity, _only, measure_sensitivity
from sixfold.integrations.transformers.layer import TurboQuantLayer
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return windows_of(tiny_tokenizer(), haystack(), 300, count=1)


@pytest.fixture(scope="module")
def found(windows: torch.Tensor) -> list[Sensitivity]:
    return measure_sensitivity(tiny_model(), windows, [8, 2], prefill=200)


def test_every_layer_side_and_width_is_there_once(found: list[Sensitivity]) -> None:
    cases = [(one.layer, one.side, one.bits) for one in found]
    assert cases == [
        (layer, side, bits) for layer in (0, 1) for side in ("keys", "values") for bits in (8, 2)
    ]


def test_fewer_bits_cost_more_on_either_side_of_every_layer(found: list[Sensitivity]) -> None:
    for fine, coarse in zip(found[::2], found[1::2], strict=True):
        assert 0 < fine.kl.mean < 0.05 * coarse.kl.mean


def test_both_sides_at_the_finest_width_are_the_same_cache(found: list[Sensitivity]) -> None:
    by_case = {(one.layer, one.side, one.bits): one.kl.mean for one in found}
    for layer in (0, 1):
        assert by_case[layer, "keys", 8] == by_case[layer, "values", 8]


def test_a_layer_without_influence_costs_nothing(windows: torch.Tensor) -> None:
    model = type(tiny_model())(tiny_model().config).eval()
    model.load_state_dict(tiny_model().state_dict())
    # Nothing of the first layer's attention is passed on; its keys do not matter in the second.
    torch.nn.init.zeros_(model.model.layers[0].self_attn.o_proj.weight)
    torch.nn.init.zeros_(model.model.layers[1].self_attn.q_proj.weight)
    cost = {
        (one.layer, one.side): one.kl.mean
        for one in measure_sensitivity(model, windows, [2], prefill=200)
    }
    assert cost[0, "keys"] < 1e-9
    assert cost[0, "values"] < 1e-9
    assert cost[1, "keys"] < 0.05 * cost[1, "values"]


def test_progress_names_the_layer_and_the_side(windows: torch.Tensor) -> None:
    said: list[str] = []
    measure_sensitivity(
        tiny_model(),
        windows,
        [2],
        prefill=200,
        progress=lambda done, total, name: said.append(name),
    )
    assert "keys of layer 0 at 2 bits" in said
    assert not any(name.startswith("(") for name in said)


def test_layers_not_measured_hold_no_codes() -> None:
    made = _only(1, "values", 3, 2, {"recent_window": 0})(tiny_model())
    first, second = made.layers
    assert not isinstance(first, TurboQuantLayer)
    assert isinstance(second, TurboQuantLayer)
    assert (second.policy.key_bits, second.policy.value_bits) == (8, 3)
