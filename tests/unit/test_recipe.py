"""The study of docs/recipe.md: what it changes is what it says, and only for as long as it says."""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.recipe import variants
from benchmarks.recipe.measure import measure
from benchmarks.recipe.models import with_value_map
from benchmarks.recipe.studies import STUDIES
from sixfold.cache import CachePolicy, affine
from sixfold.eval.embedded import haystack, load_embedded
from tests.layers import Shape
from tools.quality_tables import recipe_table

NO_WINDOWS = CachePolicy(key_bits=3, value_bits=3, sink_tokens=0, recent_window=0)


def attended(layer: Any, policy: CachePolicy = NO_WINDOWS) -> Tensor:
    """The second chunk's output."""
    shape = Shape()
    store = layer(*shape.empty(), policy)
    for seed in (1, 2):
        query, keys, values = shape.tokens(128, seed)
        store.append(keys, values)
        out = store.attend(query, scaling=shape.scaling)
    found: Tensor = out
    return found


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("weigh", [True, False])
def test_a_value_map_changes_values_and_no_logit(center: bool, weigh: bool) -> None:
    model, tokenizer = load_embedded()
    ids = torch.tensor(tokenizer(haystack()[:900])["input_ids"])
    mapped = with_value_map(model, ids, center=center, weigh=weigh)
    with torch.no_grad():
        before, after = (m(ids[None], use_cache=False).logits for m in (model, mapped))
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)
    weights = [m.model.layers[1].self_attn.v_proj.weight for m in (model, mapped)]
    assert torch.allclose(*weights) == (not weigh)


def test_a_simulation_that_changes_nothing_is_the_layer() -> None:
    class Unchanged(variants.Simulated):
        def read(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            return self.dequantized()

    real = attended(variants.CompressedLayer)
    torch.testing.assert_close(attended(Unchanged), real, rtol=2e-2, atol=2e-2)
    for other in (variants.ChannelSplit, variants.Recoded):
        found = attended(other)
        assert not torch.allclose(found, real, rtol=2e-2, atol=2e-2)
        assert (found - real).norm() < 0.5 * real.norm()


def test_patches_end_with_their_block() -> None:
    plain = attended(variants.CompressedLayer)
    patches = [
        *(variants.scales("norm", "norm"), variants.moment(8), variants.first_tokens(16)),
        *(variants.without_massive, variants.shared_by_pairs),
    ]
    for patch in patches:
        with patch():
            attended(variants.CompressedLayer)
        assert torch.equal(attended(variants.CompressedLayer), plain)
    with variants.scales("norm", "norm")():
        assert not torch.equal(attended(variants.CompressedLayer), plain)


def test_fourth_powers_are_what_ships() -> None:
    _, keys, _ = Shape().tokens(64)
    valid, mean = torch.ones(2, 2, 64, dtype=torch.bool), keys.mean(2)
    shipped = affine.channel_energy(keys, valid, mean)
    with variants.moment(4)():
        torch.testing.assert_close(affine.channel_energy(keys, valid, mean), shipped)
    with variants.moment(2)():
        assert not torch.allclose(affine.channel_energy(keys, valid, mean), shipped)


@pytest.mark.parametrize("study", STUDIES)
def test_every_width_has_a_reference_at_its_own_bytes(study: str) -> None:
    cases = STUDIES[study].cases
    assert len({(case.label, case.bits) for case in cases}) == len(cases)
    for case in cases:
        layers = case.options.get("per_layer", {0: {}}).values()
        widths = [case.settings | fields for fields in layers]
        spent = sum(one["key_bits"] + one["value_bits"] for one in widths) / len(widths)
        assert spent == 2 * case.bits


@pytest.mark.slow
def test_a_study_runs_to_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.recipe.measure.WINDOWS", 2)
    rows = measure("codes", "plain")
    lines = recipe_table({"rows": rows, "window_tokens": 768, "chunk": 64}).splitlines()
    assert len([line for line in lines if line.startswith("|")]) == len(rows) + 2
    assert rows[0]["kl_change"]["mean"] == 0
