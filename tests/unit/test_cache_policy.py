"""What a width is spent on when nobody says so."""

import pytest
from transformers import DeepseekV3Config, LlamaConfig, PreTrainedConfig

from sixfold import TurboQuantCache
from sixfold.cache import CachePolicy, cache_nbytes
from sixfold.cache.coder import coders
from sixfold.cache.policy import SPLITS
from sixfold.integrations.transformers.config import layer_shapes
from sixfold.integrations.transformers.layer import TurboQuantLayer
from sixfold.kernels.types import CodeName
from sixfold.packing import Bits

WIDTHS: tuple[Bits, ...] = (1, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8)


def widths(policy: CachePolicy) -> tuple[Bits, Bits]:
    return policy.key_bits, policy.value_bits


CODES: tuple[CodeName, ...] = ("codebook", "trellis")
EVERY_SPLIT = [(code, bits) for code in CODES for bits in SPLITS[code]]


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("bits", WIDTHS)
def test_keys_and_values_together_have_the_bits_asked_for(bits: Bits, code: CodeName) -> None:
    keys, values = widths(CachePolicy.spending(bits, code=code))
    assert keys + values == 2 * bits
    assert keys >= values
    assert (keys > values) == (bits in SPLITS[code])


def test_what_is_named_is_what_one_gets() -> None:
    assert widths(CachePolicy.spending(3.5, key_bits=4)) == (4, 3.5)
    assert widths(CachePolicy.spending(3.5, value_bits=2)) == (3.5, 2)
    assert widths(CachePolicy.spending(3.5, key_bits=3.5)) == (3.5, 3.5)
    assert widths(CachePolicy.spending(3.5, key_bits=None, value_bits=None)) == (4, 3)


def policies(config: PreTrainedConfig, bits: Bits, code: CodeName) -> list[CachePolicy]:
    layers = TurboQuantCache(config, bits, code=code).layers
    return [layer.policy for layer in layers if isinstance(layer, TurboQuantLayer)]


@pytest.mark.parametrize(("code", "bits"), EVERY_SPLIT)
def test_a_split_holds_no_more_bytes(code: CodeName, bits: Bits) -> None:
    config = LlamaConfig(num_hidden_layers=2)
    split = policies(config, bits, code)
    assert {widths(policy) for policy in split} == {SPLITS[code][bits]}
    even = [CachePolicy(key_bits=bits, value_bits=bits, code=code)] * 2
    held, before = (
        cache_nbytes(layer_shapes(config, chosen), tokens=4096) for chosen in (split, even)
    )
    # Two codebooks instead of one, once for the whole cache: 128 points and 32, or 128 states each.
    assert held <= before + 2 * 4 * (128 + 128)


def test_longer_keys_get_no_more() -> None:
    config = DeepseekV3Config(num_hidden_layers=2)
    assert widths(policies(config, 3, "codebook")[0]) == (3, 3)


# Codes fill whole bytes: at 3.5 and 2.5 bits vectors of 80 coordinates take 4 bytes more than at 3.
@pytest.mark.parametrize(("dim", "split"), [(64, True), (80, False), (96, False), (128, True)])
def test_bytes_decide(dim: int, split: bool) -> None:
    def chosen(bits: Bits, *dims: int) -> tuple[Bits, Bits]:
        return widths(CachePolicy.spending(bits, [(x, x) for x in dims], code="codebook"))

    assert chosen(3, dim) == (SPLITS["codebook"][3] if split else (3, 3))
    assert chosen(3.5, dim) == (4, 3)
    assert chosen(3, 128, dim)[0] == (3.5 if split else 3)


@pytest.mark.parametrize("dims", [[(8, 8)], [(128, 128), (8, 8)]], ids=str)
@pytest.mark.parametrize("bits", WIDTHS)
def test_who_has_no_trellis_spends_bits_as_its_codebook_does(
    bits: Bits, dims: list[tuple[int, int]]
) -> None:
    """Even if it is one layer of many."""
    codebook, trellis = (CachePolicy.spending(bits, dims, code=code) for code in CODES)
    assert widths(trellis) == widths(codebook)


@pytest.mark.parametrize("dim", [32, 64, 72, 80, 96, 120, 128, 192, 256, 576])
@pytest.mark.parametrize("bits", WIDTHS)
def test_no_code_takes_more_bytes_than_the_other(dim: int, bits: Bits) -> None:
    of = {
        code: sum(x.page_bytes for x in coders(CachePolicy(bits, bits, code=code), dim, dim))
        for code in CODES
    }
    assert of["trellis"] <= of["codebook"]


@pytest.mark.parametrize(
    ("dim", "bits", "code"),
    [
        (128, 2.5, "trellis"),
        (32, 1, "trellis"),
        (128, 3.5, "codebook"),  # two windows lie in more than two bytes
        (128, 5, "codebook"),
        (24, 4, "codebook"),  # few coordinates
        (36, 2.5, "codebook"),  # 90 bits
    ],
)
def test_who_has_a_trellis(dim: int, bits: Bits, code: CodeName) -> None:
    keys, values = coders(CachePolicy(bits, 8, code="trellis"), dim, dim)
    assert (keys.code, values.code) == (code, "codebook")
    assert coders(CachePolicy(bits, 8, code="codebook"), dim, dim)[0].code == "codebook"
