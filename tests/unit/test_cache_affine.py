"""The key map's estimates: what they make of ordinary, massive and huge keys."""

import pytest
import torch
from torch import Tensor

from sixfold.cache import affine
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


@pytest.mark.parametrize("size", [1e-6, 1e6, 1e30, 1e36, 3e37])
def test_keys_of_any_size_have_a_finite_map(size: float) -> None:
    found = estimate(size * gaussian(), gaussian(1))
    assert bool(torch.isfinite(found.mean).all())
    assert bool(torch.isfinite(found.scale).all())
    assert bool((found.scale > 0).all())


def beginning(kind: str) -> Tensor:
    """Keys of two heads, of which a part may be one token again and again, turned by RoPE."""
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(1, 2, TOKENS, DIM, generator=generator)
    if kind != "text":
        keys[:, :, TOKENS // 3 :] = keys[:, :, TOKENS // 3 : TOKENS // 3 + 1]
    if kind == "one head":
        keys[:, 1] = torch.randn(TOKENS, DIM, generator=generator)
    angles = torch.arange(TOKENS)[:, None] * 10_000 ** -torch.linspace(0, 1, DIM // 2)
    turn = torch.polar(torch.ones_like(angles), angles)
    turned = torch.view_as_real(torch.view_as_complex(keys.unflatten(3, (-1, 2))) * turn)
    return turned.flatten(3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["text", "run", "one head"])
def test_what_is_soon_seen_of_runs_changes_no_map(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = beginning(kind).to(dtype)
    found, in_runs = estimate(keys), affine.repeats(keys)
    assert (float(in_runs.float().mean()) > 0.1) == (kind != "text")
    # As where nobody may ask: every run is looked for.
    monkeypatch.setattr(affine, "_in_runs", lambda keys, equal: torch.ones_like(in_runs))
    monkeypatch.setattr(affine, "repeats", lambda keys: in_runs)
    exact = estimate(keys)
    assert torch.equal(found.mean, exact.mean)
    assert torch.equal(found.scale, exact.scale)


@pytest.mark.parametrize("hostile", [None, float("nan"), float("inf"), 1e19])
def test_queries_count_alike_with_and_without_a_mask(hostile: float | None) -> None:
    queries = torch.randn(2, 4, 700, DIM, generator=torch.Generator().manual_seed(2))
    if hostile is not None:
        # As large in all channels that the sum of the squares overflows, though none does.
        queries[0, 1, 5] = hostile
    everything = torch.ones(2, 700, dtype=torch.bool)
    masked = QueryEnergy.observe(queries, everything, 2).squares
    assert torch.equal(QueryEnergy.observe(queries, None, 2).squares, masked)
    assert bool(masked.isfinite().all())
