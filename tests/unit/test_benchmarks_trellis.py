"""The trellis in a cache: the bytes of the code it replaces, less error, nothing else changed."""

import pytest
import torch
from torch import Tensor

from benchmarks import trellis, trellis_choices
from benchmarks.trellis_cache import decoded_code, trellis_code
from sixfold.cache import CachePolicy, CompressedLayer
from sixfold.cache.code import MakeCode
from sixfold.packing import Bits
from tests.vectors import gaussian

HEADS, TOKENS, DIM = 2, 128, 64


def tokens(seed: int, count: int = TOKENS) -> Tensor:
    return gaussian(HEADS * count, DIM, seed).view(1, HEADS, count, DIM)


def filled(make_code: MakeCode, bits: Bits) -> CompressedLayer:
    keys, values = 2 + tokens(1), tokens(2)
    policy = CachePolicy(bits, bits, sink_tokens=0, recent_window=0)
    layer = CompressedLayer(keys, values, policy, make_code=make_code)
    layer.append(keys, values)
    layer.attend(tokens(3), scaling=DIM**-0.5)
    return layer


@pytest.mark.parametrize("bits", [2, 2.5])
def test_the_trellis_takes_the_same_bytes_and_loses_less(bits: Bits) -> None:
    scalar, coded = filled(decoded_code, bits), filled(trellis_code, bits)
    held = [
        [part.nbytes for run in x.history.runs for part in run.slab.pool] for x in (scalar, coded)
    ]
    assert held[0] == held[1]
    for exact, one, other in zip(
        (2 + tokens(1), tokens(2)), scalar.dequantized(), coded.dequantized(), strict=True
    ):
        errors = [(x - exact).square().mean() for x in (one, other)]
        assert 0.5 < errors[1] / errors[0] < 0.8
    assert coded.prefix is not None
    assert scalar.prefix is not None
    assert torch.equal(coded.prefix.key_map.scale, scalar.prefix.key_map.scale)


def test_attention_is_exact_over_what_is_decoded() -> None:
    layer = filled(trellis_code, 4)
    keys, values, query = tokens(4, 1), tokens(5, 1), tokens(6, 1)
    layer.append(keys, values)
    all_keys, all_values = layer.dequantized()
    expected = torch.nn.functional.scaled_dot_product_attention(query, all_keys, all_values)
    torch.testing.assert_close(layer.attend(query, scaling=DIM**-0.5), expected)


def test_tables_hold_what_was_measured() -> None:
    row = trellis.distortion(32, 2, vectors=64, rotations=1)
    assert row["bound"] < row["error"]["256"] < 0.8 * row["error"][trellis.SCALAR]
    shipped, random = (
        trellis_choices.error(trellis_choices.CODEBOOKS[name](2), 2, dim=32, vectors=64)
        for name in (trellis_choices.SHIPPED, "random normal codewords")
    )
    assert shipped < 0.95 * random
    with trellis_choices.seam(1):
        careless = trellis_choices.error(trellis_choices.CODEBOOKS["shipped"](2), 2, 32, 64)
    assert careless > 1.05 * shipped
