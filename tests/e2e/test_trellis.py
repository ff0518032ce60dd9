"""Caches of trellis codes: what attention makes of codes is what it makes of decoded ones."""

import pytest
from transformers import PreTrainedModel

from sixfold import TurboQuantCache
from sixfold.packing import Bits
from tests.e2e.decoding import Batch, batch, continue_decoding, forward, relative_error
from tests.e2e.models import tiny_model

# Rounding alone; but a path may change as a whole by the last bit of a vector.
TOLERANCE = 0.01


def prefilled(model: PreTrainedModel, bits: Bits, data: Batch) -> TurboQuantCache:
    cache = TurboQuantCache.for_model(model, bits, recent_window=0, code="trellis")
    forward(model, cache, data, 0, data.prompt)
    return cache


@pytest.mark.usefixtures("exact_arithmetic")
@pytest.mark.parametrize("bits", [1, 2, 2.5, 3, 3.5, 4])
@pytest.mark.parametrize("name", ["llama-64", "llama-80", "llama-96", "mistral", "gemma2"])
def test_codes_are_attended_as_what_they_decode_to(name: str, bits: Bits) -> None:
    data, model = batch(), tiny_model(name)
    fused = prefilled(model, bits, data)
    coders = {layer.store.code.keys.code for layer in fused.compressed_layers}
    assert coders == {"trellis"}
    decoded = fused.fork()
    for layer in decoded.compressed_layers:
        layer.fused = False
    logits = [continue_decoding(model, cache, data) for cache in (fused, decoded)]
    assert relative_error(*logits) < TOLERANCE


def test_fewer_bits_say_less_and_a_trellis_more_than_a_codebook() -> None:
    data, model = batch(), tiny_model("llama-64")
    exact = TurboQuantCache.for_model(model, skip_layers=[0, 1])
    forward(model, exact, data, 0, data.prompt)
    expected = continue_decoding(model, exact, data)
    lost = []
    for bits in (4, 3, 2.5, 2):
        cache = prefilled(model, bits, data)
        lost.append(relative_error(continue_decoding(model, cache, data), expected))
    assert lost == sorted(lost)
    codebook = TurboQuantCache.for_model(model, 2, recent_window=0, code="codebook")
    forward(model, codebook, data, 0, data.prompt)
    assert lost[-1] < relative_error(continue_decoding(model, codebook, data), expected)
