"""What a width is spent on when nobody says so."""

import pytest
from transformers import DeepseekV3Config, LlamaConfig, PreTrainedConfig

from sixfold import TurboQuantCache
from sixfold.cache import CachePolicy, cache_nbytes
from sixfold.cache.policy import SPLITS
from sixfold.integrations.transformers.config import layer_shapes
from sixfold.integrations.transformers.layer import TurboQuantLayer
from sixfold.packing import Bits

WIDTHS: tuple[Bits, ...] = (1, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8)


def widths(policy: CachePolicy) -> tuple[Bits, Bits]:
    return policy.key_bits, policy.value_bits


@pytest.mark.parametrize("bits", WIDTHS)
def test_keys_and_values_together_have_the_bits_asked_for(bits: Bits) -> None:
    keys, values = widths(CachePolicy.spending(bits))
    assert keys + values == 2 * bits
    assert keys >= values
    assert (keys > values) == (bits in SPLITS)


def test_what_is_named_is_what_one_gets() -> None:
    assert widths(CachePolicy.spending(3, key_bits=4)) == (4, 3)
    assert widths(CachePolicy.spending(3, value_bits=2)) == (3, 2)
    assert widths(CachePolicy.spending(3, key_bits=3)) == (3, 3)
    assert widths(CachePolicy.spending(3, key_bits=None, value_bits=None)) == SPLITS[3]


def policies(config: PreTrainedConfig, bits: Bits) -> list[CachePolicy]:
    layers = TurboQuantCache(config, bits).layers
    return [layer.policy for layer in layers if isinstance(layer, TurboQuantLayer)]


@pytest.mark.parametrize("bits", SPLITS)
def test_a_split_holds_no_more_bytes(bits: Bits) -> None:
    config = LlamaConfig(num_hidden_layers=2)
    split = policies(config, bits)
    assert {widths(policy) for policy in split} == {SPLITS[bits]}
    even = [CachePolicy(key_bits=bits, value_bits=bits)] * 2
    held, before = (
        cache_nbytes(layer_shapes(config, chosen), tokens=4096) for chosen in (split, even)
    )
    # Two codebooks instead of one: 128 and 32 points, once for the whole cache.
    assert held <= before + 2 * 4 * (128 + 32)


def test_longer_keys_get_no_more() -> None:
    config = DeepseekV3Config(num_hidden_layers=2)
    assert widths(policies(config, 3)[0]) == (3, 3)


# Codes fill whole bytes: at 3.5 and 2.5 bits vectors of 80 coordinates take 4 bytes more than at 3.
@pytest.mark.parametrize(("dim", "split"), [(64, True), (80, False), (96, False), (128, True)])
def test_bytes_decide(dim: int, split: bool) -> None:
    assert widths(CachePolicy.spending(3, [(dim, dim)])) == (SPLITS[3] if split else (3, 3))
    assert widths(CachePolicy.spending(3.5, [(dim, dim)])) == SPLITS[3.5]
    assert widths(CachePolicy.spending(3, [(128, 128), (dim, dim)]))[0] == (3.5 if split else 3)
