"""Bytes of a token in vLLM's blocks where layers differ, as vLLM counts them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sixfold.integrations.vllm.alignment import LayerBlock, aligned_nbytes
from sixfold.integrations.vllm.names import WIDTHS, token_nbytes
from sixfold.packing import Bits

LAYERS = st.builds(
    LayerBlock,
    st.sampled_from([1, 2, 3, 4, 8, 16]),
    st.sampled_from([32, 64, 80, 96, 128, 256, 512]),
    st.sampled_from([64, 128, 256]),
    st.sampled_from([64, 128]),
)


def held(bits: Bits, layers: list[LayerBlock], contents: list[int]) -> float:
    """Bytes of a token of all layers, as vLLM 0.32's `unify_kv_cache_spec_page_size` has it."""
    pages = [one.kv_heads * one.tokens * c for one, c in zip(layers, contents, strict=True)]
    largest = max(pages)
    return sum(
        page / one.tokens if largest % page == 0 else largest / one.tokens
        for one, page in zip(layers, pages, strict=True)
    )


@given(st.lists(LAYERS, min_size=1, max_size=6), st.sampled_from([*WIDTHS.values()]))
@settings(max_examples=200, deadline=None)
def test_blocks_fit_each_other_and_never_hold_less_than_before(
    layers: list[LayerBlock], bits: Bits
) -> None:
    least = [token_nbytes(bits, one.key_dim, one.value_dim) for one in layers]
    found = [aligned_nbytes(bits, one, layers) for one in layers]
    assert all(a >= b for a, b in zip(found, least, strict=True))
    assert held(bits, layers, found) <= held(bits, layers, least)


@pytest.mark.parametrize("bits", WIDTHS.values())
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_layers_that_are_alike_have_no_empty_bytes(bits: Bits, dim: int) -> None:
    layers = [LayerBlock(4, dim, dim, 64), LayerBlock(4, dim, dim, 128)] * 8
    assert {aligned_nbytes(bits, one, layers) for one in layers} == {token_nbytes(bits, dim, dim)}


@pytest.mark.parametrize("bits", WIDTHS.values())
def test_layers_of_gemma_4_lose_next_to_nothing(bits: Bits) -> None:
    """Heads of 256 coordinates that slide, and of 512 that do not."""
    layers = [LayerBlock(4, 256, 256, 64)] * 5 + [LayerBlock(1, 512, 512, 128)]
    least = sum(one.kv_heads * token_nbytes(bits, *one[1:3]) for one in layers)
    found = [aligned_nbytes(bits, one, layers) for one in layers]
    assert held(bits, layers, found) < 1.01 * least
    assert sum(one.kv_heads * c for one, c in zip(layers, found, strict=True)) < 1.01 * least


def test_a_layer_that_is_not_of_the_model_is_as_it_is() -> None:
    one, other = LayerBlock(1, 64, 64, 64), LayerBlock(1, 128, 128, 64)
    assert aligned_nbytes(4, one, [other]) == token_nbytes(4, 64, 64)
