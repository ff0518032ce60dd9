"""The key map's estimates: what they make of ordinary, massive and huge keys."""

import pytest
import torch
from torch import Tensor

from sixfold.cache.affine import QueryEnergy, estimate_key_map
from sixfold.kernels.types import KeyMap

TOKENS, DIM = 512, 32


def gaussian(seed: int = 0) -> Tensor:
    """Keys of one sequence and head."""
    return torch.randn(1, 1, TOKENS, DIM, generator=torch.Generator().manual_seed(seed))


def estimate(keys: Tensor, queries: Tensor | None = None) -> KeyMap:
    valid = torch.ones(1, TOKENS, dtype=torch.bool)
    energy = None if queries is None else QueryEnergy.observe(queries, None, 1)
    return estimate_key_map(keys, valid, energy, center=True, equalize=True)


def test_ordinary_channels_are_left_alone() -> None:
    assert torch.equal(estimate(gaussian(), gaussian(1)).scale, torch.ones(1, 1, DIM))


def test_an_outlier_channel_gets_the_minimiser() -> None:
    keys, queries = gaussian(), gaussian(1)
    keys[..., 5] *= 9
    queries[..., 5] /= 4
    scale = estimate(keys, queries).scale[0, 0]
    # (σ_q/σ_k)^½, within the sampling error of a fourth moment.
    assert float(scale[5]) == pytest.approx(1 / 6, rel=0.1)
    assert torch.equal(scale[torch.arange(DIM) != 5], torch.ones(DIM - 1))


def test_massive_tokens_shrink_their_channel() -> None:
    keys = gaussian()
    # One token in a hundred: the root mean square of the channel grows by √2 only, for which
    # (σ_q/σ_k)^½ = 0.84 would lie in the dead zone.
    keys[:, :, ::100, 5] += 10
    scale = estimate(keys, gaussian(1)).scale[0, 0]
    assert float(scale[5]) < 0.7
    assert torch.equal(scale[torch.arange(DIM) != 5], torch.ones(DIM - 1))


@pytest.mark.parametrize("size", [1e-6, 1e6, 1e30])
def test_keys_of_any_size_have_a_finite_map(size: float) -> None:
    found = estimate(size * gaussian(), gaussian(1))
    assert bool(torch.isfinite(found.scale).all())
    assert bool((found.scale > 0).all())
