"""Positions that no sequence has are refused before anything is read."""

import dataclasses

import pytest
import torch

from sixfold.cache import CachePolicy, CompressedLayer
from sixfold.errors import SixfoldError
from tests.vectors import gaussian

pytest.importorskip("sixfold.kernels.attention.cpu")


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("position", [2**63 - 1, 2**63 - 3, 2**62, -1, -(2**63)])
def test_positions_beyond_any(position: int, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIXFOLD_BACKEND", "cpu")
    keys, values = (gaussian(128, 64, seed=n)[None, None] for n in (3, 4))
    layer = CompressedLayer(keys, values, CachePolicy(recent_window=0))
    layer.append(keys, values)
    layer.compress()
    assert layer.prefix is not None
    padding = torch.tensor([position])
    beyond = {"padding": padding, "end": padding + 4, "assumed": False}
    layer.prefix = dataclasses.replace(layer.prefix, **beyond)
    mask = torch.ones(1, 1, 1, 128, dtype=torch.bool) if masked else None
    if position == 2**62 and not masked:
        # Nothing is that late: nobody is seen.
        assert layer.attend(keys[:, :, :1], scaling=0.1).isfinite().all()
        return
    with pytest.raises(SixfoldError, match=r"position"):
        layer.attend(keys[:, :, :1], scaling=0.1, mask=mask)
