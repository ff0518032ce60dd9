"""What a width is spent on when nobody says so."""

import pytest
from transformers import DeepseekV3Config, LlamaConfig, PreTrainedConfig

from sixfold import TurboQuantCache
from sixfold.cache import CachePolicy, cache_nbytes
from sixfold.cache.policy import SPLITS
from sixfold.integrations.transformers.config import keys_are_longer, layer_shapes
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
    assert keys_are_longer(config)
    assert widths(policies(config, 3)[0]) == (3, 3)
    assert CachePolicy.spending(3, longer_keys=True) == CachePolicy(key_bits=3, value_bits=3)
