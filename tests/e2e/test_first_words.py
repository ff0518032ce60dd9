"""What a user of `for_model` is told at first: how small it will be, and what makes it slow."""

import re
import warnings

import pytest
import torch

from sixfold import TurboQuantCache
from sixfold.integrations.transformers.keyword import cache_argument
from sixfold.kernels import _dispatch
from tests.tiny import tiny_model


@pytest.mark.waiting
def test_a_short_cache_says_how_small_a_long_one_is() -> None:
    """That of a short text is larger than without compression, which needs a word why."""
    model = tiny_model()
    cache = TurboQuantCache.for_model(model, bits=4)
    model(torch.arange(60)[None], **cache_argument(cache))
    said = str(cache)
    assert said.startswith("TurboQuantCache(4 bits, 2 layers, 60 tokens in ")
    assert (
        f"in {cache.nbytes / 1e6:.1f} MB instead of {cache.uncompressed_nbytes / 1e6:.1f}" in said
    )
    found = re.search(r"([0-9.]+) times smaller at 32,768 tokens\)$", said)
    assert found is not None
    assert 3 < float(found[1]) < 4


def test_without_compiled_kernels_it_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SIXFOLD_BACKEND", raising=False)
    monkeypatch.setattr(_dispatch, "_said", set())
    monkeypatch.setattr(_dispatch, "_load", lambda operation, backend: "no compiler was found")
    with pytest.warns(RuntimeWarning, match="no compiler was found.*`sixfold doctor`"):
        TurboQuantCache.for_model(tiny_model(), bits=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TurboQuantCache.for_model(tiny_model(), bits=4)
