"""A layer with trellis codes: the bytes of the code it replaces, less error, all else the same."""

import pytest
import torch
from torch import Tensor

from sixfold.cache import CachePolicy, CompressedLayer
from sixfold.kernels.types import CodeName
from sixfold.packing import Bits
from tests.vectors import gaussian

HEADS, TOKENS, DIM = 2, 128, 64


def tokens(seed: int, count: int = TOKENS) -> Tensor:
    return gaussian(HEADS * count, DIM, seed).view(1, HEADS, count, DIM)


def filled(code: CodeName, bits: Bits) -> CompressedLayer:
    keys, values = 2 + tokens(1), tokens(2)
    policy = CachePolicy(bits, bits, sink_tokens=0, recent_window=0, code=code)
    layer = CompressedLayer(keys, values, policy)
    layer.append(keys, values)
    layer.attend(tokens(3), scaling=DIM**-0.5)
    return layer


@pytest.mark.parametrize("bits", [2, 2.5, 3, 4])
def test_the_trellis_takes_the_same_bytes_and_loses_less(bits: Bits) -> None:
    codebook, trellis = filled("codebook", bits), filled("trellis", bits)
    held = [
        [part.nbytes for run in x.history.runs for part in run.slab.pool]
        for x in (codebook, trellis)
    ]
    assert held[0] == held[1]
    for exact, one, other in zip(
        (2 + tokens(1), tokens(2)), codebook.dequantized(), trellis.dequantized(), strict=True
    ):
        errors = [(x - exact).square().mean() for x in (one, other)]
        assert 0.5 < errors[1] / errors[0] < 0.8
    assert trellis.prefix is not None
    assert codebook.prefix is not None
    assert torch.equal(trellis.prefix.key_map.scale, codebook.prefix.key_map.scale)


@pytest.mark.parametrize("bits", [2, 2.5, 3, 4])
def test_attention_is_exact_over_what_is_decoded(bits: Bits) -> None:
    layer = filled("trellis", bits)
    keys, values, query = tokens(4, 1), tokens(5, 1), tokens(6, 1)
    layer.append(keys, values)
    all_keys, all_values = layer.dequantized()
    expected = torch.nn.functional.scaled_dot_product_attention(query, all_keys, all_values)
    found = layer.attend(query, scaling=DIM**-0.5)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)
