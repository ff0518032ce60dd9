"""The study of codes: what it imitates is what the product does where it imitates the product."""

import pytest
import torch
from torch import Tensor

from benchmarks.codes.fits import keys_by, keys_in_quarters, values_by, values_in_quarters
from benchmarks.codes.imitated import Beginning, Coded, Fit
from benchmarks.codes.leads import Lead, leads, output_moments
from sixfold import TurboQuantCache
from sixfold.cache.affine import QueryEnergy, estimate_key_map
from sixfold.eval.perplexity import fill
from sixfold.packing import Bits
from tests.tiny import tiny_model
from tests.vectors import gaussian

HEADS, TOKENS, DIM = 2, 512, 64


def filled(lead: Lead, bits: Bits) -> TurboQuantCache:
    model = tiny_model()
    cache = lead.cache(bits)(model)
    assert isinstance(cache, TurboQuantCache)
    fill(model, torch.arange(300) * 7 % model.config.vocab_size, cache, 200)
    return cache


@pytest.mark.parametrize("bits", [2.5, 3, 4])
def test_the_product_imitated_holds_what_the_product_holds(bits: Bits) -> None:
    product, same = (filled(x, bits) for x in (Lead("it"), Lead("same", keys_by(), values_by())))
    assert product.nbytes == same.nbytes
    # Keys of later layers come out of attention, which a cache of codes reads in another way.
    layers = product.compressed_layers[0], same.compressed_layers[0]
    for one, other in zip(*(layer.dense() for layer in layers), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def beginning(spread: Tensor) -> Beginning:
    """Keys and values with channels of this spread, asked in the same way."""
    keys, values, queries = (
        gaussian(HEADS * TOKENS, DIM, seed).view(HEADS, TOKENS, DIM) * spread for seed in (1, 2, 3)
    )
    valid = torch.ones(1, TOKENS, dtype=torch.bool)
    energy = QueryEnergy.observe(queries[None], None, HEADS)
    key_map = estimate_key_map(keys[None], valid, energy, center=True, equalize=True)
    asked = queries.mT @ queries
    return Beginning(keys, values, asked, key_map, torch.diag(spread**2).expand(HEADS, DIM, DIM))


def lost(coded: Coded, x: Tensor, weights: Tensor) -> float:
    """Expected squared error of what is made of vectors."""
    error = coded(x) - x
    return float(torch.einsum("htd,hde,hte->", error, weights, error))


@pytest.mark.parametrize("shrink", [0.1, 1.0])
def test_quarters_lose_less_where_channels_differ(shrink: float) -> None:
    begun = beginning(torch.logspace(0, 0.75, DIM))
    sides: list[tuple[Fit, Fit, Tensor, Tensor]] = [
        (keys_in_quarters((1, 0, 0, -1), shrink=shrink), keys_by(), begun.keys, begun.asked),
        (values_in_quarters((1, 0, 0, -1), shrink=shrink), values_by(), begun.values, begun.output),
    ]
    for quarters, plain, x, weights in sides:
        better, usual = (lost(fit(begun, 3), x, weights) for fit in (quarters, plain))
        assert better < 0.9 * usual


def test_quarters_of_white_channels_lose_what_whole_bits_lose() -> None:
    begun = beginning(torch.ones(DIM))
    even = keys_in_quarters((0, 0, 0, 0), shrink=1.0)
    errors = [lost(fit(begun, 3), begun.keys, begun.asked) for fit in (even, keys_by())]
    assert errors[0] == pytest.approx(errors[1], rel=0.1)


def test_output_moments_are_those_of_the_columns() -> None:
    model = tiny_model()
    config = model.config
    group = config.num_attention_heads // config.num_key_value_heads
    weight = model.model.layers[1].self_attn.o_proj.weight
    width = group * config.head_dim
    columns = weight[:, width : 2 * width].unflatten(1, (group, -1))
    expected = sum(x.T @ x for x in columns.unbind(1))
    torch.testing.assert_close(output_moments(model)[1][1], expected)


def test_leads_of_a_width_begin_with_the_product_and_have_names_of_their_own() -> None:
    for bits in (2, 2.5, 3, 4):
        found = leads(bits)
        assert (found[0].keys, found[0].options) == (None, {})
        assert len({lead.label for lead in found}) == len(found)
