"""The study of docs/recipe.md: what it changes is what it says, and nothing else."""

import pytest
import torch
from torch import Tensor

from benchmarks.recipe import variants
from benchmarks.recipe.measure import measure
from benchmarks.recipe.models import with_value_map
from benchmarks.recipe.studies import STUDIES
from benchmarks.recipe.variants import MakeVariant, Variant
from benchmarks.with_layers import with_layers
from sixfold.cache import CachePolicy, CompressedLayer, affine
from sixfold.eval.caches import compressed
from sixfold.eval.embedded import haystack, load_embedded
from sixfold.integrations.transformers.keyword import cache_argument
from tests.layers import Shape
from tools.quality_tables import recipe_table

NO_WINDOWS = CachePolicy(key_bits=3, value_bits=3, sink_tokens=0, recent_window=0)
CHUNK = 128


def attended(variant: Variant, policy: CachePolicy = NO_WINDOWS) -> Tensor:
    """The second chunk's output."""
    shape = Shape()
    store = CompressedLayer(*shape.empty(), policy, make_code=variant.make_code, fit=variant.fit)
    for seed in (1, 2):
        query, keys, values = shape.tokens(CHUNK, seed)
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
    real = attended(Variant())
    unchanged = attended(Variant(variants.Simulated.make))
    torch.testing.assert_close(unchanged, real, rtol=2e-2, atol=2e-2)
    for other in (variants.channel_split(CHUNK), variants.recoded):
        found = attended(other())
        assert not torch.allclose(found, real, rtol=2e-2, atol=2e-2)
        assert (found - real).norm() < 0.5 * real.norm()


def test_a_simulation_keeps_every_vector_as_it_was() -> None:
    shape = Shape()
    store = CompressedLayer(*shape.empty(), NO_WINDOWS, make_code=variants.Simulated.make)
    query, keys, values = shape.tokens(CHUNK, 1)
    store.append(keys, values)
    store.attend(query, scaling=shape.scaling)
    (part,) = store.history.parts
    assert isinstance(store.code, variants.Simulated)
    for exact, given in zip(store.code.exact(part), (keys, values), strict=True):
        assert torch.equal(exact, given)


@pytest.mark.parametrize(
    "variant", [variants.scales("norm", "norm"), variants.moment(8), variants.first_tokens(16)]
)
def test_a_variant_is_of_its_own_layer_alone(variant: MakeVariant) -> None:
    plain = attended(Variant())
    attended(variant())
    assert torch.equal(attended(Variant()), plain)


def test_other_scales_are_stored() -> None:
    assert not torch.equal(attended(variants.scales("norm", "norm")()), attended(Variant()))


def test_channels_of_a_pair_share_a_scale() -> None:
    """RoPE turns a channel into its partner: of scales of their own only one can be right."""
    keys = torch.randn(1, 1, 64, 8, generator=torch.Generator().manual_seed(0))
    keys[..., 1] *= 50
    seen = torch.ones(1, 64, dtype=torch.bool)
    options = {"center": True, "equalize": True}
    (scale,) = variants.shared_by_pairs().fit.estimate(keys, seen, None, **options).scale[0]
    assert scale[1] == scale[5] < 1
    (own,) = affine.estimate_key_map(keys, seen, None, center=True, equalize=True).scale[0]
    assert own[1] < own[5]


def test_fourth_powers_are_what_ships() -> None:
    _, keys, _ = Shape().tokens(64)
    valid, mean = torch.ones(2, 2, 64, dtype=torch.bool), keys.mean(2)
    shipped = affine.channel_energy(keys, valid, mean)
    torch.testing.assert_close(variants.moment_energy(keys, valid, mean, power=4), shipped)
    assert not torch.allclose(variants.moment_energy(keys, valid, mean, power=2), shipped)


@pytest.mark.parametrize(
    "variant", [variants.channel_split(CHUNK), variants.recoded, variants.exact_massive(2)]
)
def test_a_model_attends_to_what_a_variant_lets_it_see(variant: MakeVariant) -> None:
    """Through the integration, whose layers are not filled as a test fills them."""
    model, tokenizer = load_embedded()
    ids = torch.tensor(tokenizer(haystack()[:900])["input_ids"])[None, : 2 * CHUNK]
    options = {"bits": 2.5, "sink_tokens": 0, "recent_window": 0}
    logits = []
    for made in (Variant, variant):
        cache = with_layers(compressed(**options), made)(model)
        with torch.no_grad():
            for chunk in ids.split(CHUNK, 1):
                logits.append(model(chunk, **cache_argument(cache)).logits)
    assert torch.equal(logits[0], logits[2])
    assert not torch.allclose(logits[1], logits[3], rtol=1e-2, atol=1e-2)
    assert (logits[1] - logits[3]).norm() < 0.2 * logits[1].norm()


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
