"""A vector's codes depend on that vector alone."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sixfold
from sixfold.codes import Codes
from tests.vectors import gaussian

QUANTIZERS: list[Any] = [
    sixfold.TurboQuantMSE(128, 4),
    sixfold.TurboQuantMSE(80, 2.5, scale="unbiased"),
    sixfold.TurboQuantMSE(48, 3, rotation="orthogonal"),
    sixfold.TurboQuantProd(64, 3),
    sixfold.QJL(33, 40),
    sixfold.PolarQuant(72),
    sixfold.TrellisQuantizer(48, 2.5),
]


def equal(one: Codes, other: Codes) -> bool:
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, Codes) and not equal(a, b):
            return False
        if isinstance(a, torch.Tensor) and not torch.equal(a, b):
            return False
    return one.spec == other.spec


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=repr)
@settings(max_examples=15)
@given(
    batch=st.integers(1, 5),
    tokens=st.integers(1, 40),
    data=st.data(),
    seed=st.integers(0, 2**32),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
)
def test_slicing_and_batching_commute_with_encode(
    quantizer: Any, batch: int, tokens: int, data: st.DataObject, seed: int, dtype: torch.dtype
) -> None:
    x = gaussian(batch * tokens, quantizer.dim, seed).to(dtype).view(batch, tokens, -1)
    codes = quantizer.encode(x)
    row, start = data.draw(st.integers(0, batch - 1)), data.draw(st.integers(0, tokens - 1))
    assert equal(codes[row], quantizer.encode(x[row]))
    assert equal(codes[:, start:], quantizer.encode(x[:, start:]))
    assert equal(codes[row, start], quantizer.encode(x[row, start]))
    transposed = quantizer.encode(x.transpose(0, 1))
    assert equal(codes[row, start], transposed[start, row])


@given(st.integers(1, 4), st.integers(64, 200), st.integers(0, 2**32))
@settings(max_examples=15)
def test_decoded_vectors_keep_their_codes(bits: int, dim: int, seed: int) -> None:
    # Not beyond 4 bits or below 64 coordinates: normalising again moves a codeword by as much
    # as its neighbours are apart.
    dim = dim // 4 * 4
    quantizer = sixfold.TurboQuantMSE(dim, bits, scale="norm")
    codes = quantizer.encode(gaussian(8, dim, seed))
    again = quantizer.encode(quantizer.decode(codes))
    assert torch.equal(again.packed, codes.packed)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=repr)
def test_scores_of_a_slice_are_a_slice_of_the_scores(quantizer: Any) -> None:
    codes = quantizer.encode(gaussian(30, quantizer.dim, seed=1))
    queries = gaussian(4, quantizer.dim, seed=2)
    whole = quantizer.scores(queries, codes)
    torch.testing.assert_close(quantizer.scores(queries, codes[7:19]), whole[:, 7:19])
    torch.testing.assert_close(quantizer.scores(queries[1:2], codes), whole[1:2])
