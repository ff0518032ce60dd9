"""Ways to compress that the product does not offer, for as long as a block runs."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeAlias
from unittest import mock

import torch
from torch import Tensor

from sixfold.cache import affine, coder, prefix
from sixfold.cache.layer import CompressedLayer
from sixfold.integrations.transformers import layer as cache_layer
from sixfold.kernels.attention import exact_attention
from sixfold.kernels.types import KeyMap, Scale
from sixfold.quantizers import OutlierSplit, TurboQuantMSE

Patch: TypeAlias = Callable[[], AbstractContextManager[Any]]

MASSIVE = 2.0
"""Norm of a massive key or value, in medians of its head."""


def scales(keys: Scale, values: Scale) -> Patch:
    """Store these scales in place of the norms."""

    return lambda: mock.patch.dict(coder.SCALES, key=keys, value=values)


def moment(power: int) -> Patch:
    """Estimate the spread of a key channel by the mean of its `power`-th power (even)."""

    def energy(keys: Tensor, valid: Tensor, mean: Tensor) -> Tensor:
        moved = (keys.float() - mean.unsqueeze(2)) ** power
        total = moved.where(valid[..., None], 0.0).sum(2)
        mean_power: Tensor = total.pow(2 / power)
        return mean_power

    return lambda: mock.patch.object(affine, "channel_energy", energy)


def shared_by_pairs() -> AbstractContextManager[Any]:
    """One scale for both channels of a RoPE pair (i, i + dim/2), whose energies are added."""
    equalize = affine.equalizing_scale

    def shared(energy: Tensor) -> Tensor:
        first, second = energy.chunk(2, -1)
        return torch.cat([first + second] * 2, -1)

    def by_pairs(keys: Tensor, queries: Tensor | None) -> Tensor:
        return equalize(shared(keys), None if queries is None else shared(queries))

    return mock.patch.object(affine, "equalizing_scale", by_pairs)


def first_tokens(count: int) -> Patch:
    """Estimate the key map from the first `count` tokens alone, keys and queries."""
    estimate, observe = affine.estimate_key_map, affine.QueryEnergy.observe

    def few(keys: Tensor, valid: Tensor, queries: Any, **options: Any) -> KeyMap:
        return estimate(keys, valid & (valid.cumsum(1) <= count), queries, **options)

    def seen(query: Tensor, valid: Tensor | None, kv_heads: int) -> affine.QueryEnergy:
        first = None if valid is None else valid[:, :count]
        return observe(query[:, :, :count], first, kv_heads)

    @contextmanager
    def patched() -> Iterator[None]:
        with (
            mock.patch.object(prefix, "estimate_key_map", few),
            mock.patch.object(affine.QueryEnergy, "observe", seen),
        ):
            yield

    return patched


def without_massive() -> AbstractContextManager[Any]:
    """Leave tokens with a massive key in any head out of the estimate of the key map."""
    estimate = affine.estimate_key_map

    def ordinary(keys: Tensor, valid: Tensor, queries: Any, **options: Any) -> KeyMap:
        centred = keys - keys.median(2, keepdim=True).values
        return estimate(keys, valid & ~massive(centred).any(1), queries, **options)

    return mock.patch.object(prefix, "estimate_key_map", ordinary)


def massive(x: Tensor) -> Tensor:
    """Which vectors [batch, heads, tokens] are longer than `MASSIVE` medians of their head."""
    norms = torch.linalg.vector_norm(x.float(), dim=-1)
    longer: Tensor = norms > MASSIVE * norms.median(-1, keepdim=True).values
    return longer


class Simulated(CompressedLayer):
    """A layer that attends to tensors `read` makes of what it was given; codes are kept as well."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.chunks: list[tuple[Tensor, Tensor]] = []

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Remember the exact vectors, too."""
        super().append(keys, values)
        self.chunks.append((keys, values))

    def attend(self, query: Tensor, **options: Any) -> Tensor:
        """Attention to the decoded vectors after `read`."""
        if self.prefix is None:
            return super().attend(query, **options)
        keys, values = (torch.cat(side, 2) for side in zip(*self.chunks, strict=True))
        out = exact_attention(query, *self.read(keys, values), **options)
        self.compress()
        return out

    def read(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What attention sees of all tokens, given their exact keys and values."""
        raise NotImplementedError

    def mapped(self, keys: Tensor) -> Tensor:
        """Keys as they are coded."""
        assert self.prefix is not None
        key_map = self.prefix.key_map
        return (keys - key_map.mean[:, :, None]) * key_map.scale[:, :, None]


def simulated(layer: type[Simulated]) -> Patch:
    """Put `layer` in place of the product's."""
    return lambda: mock.patch.object(cache_layer, "CompressedLayer", layer)


class MassiveExact(Simulated):
    """Massive keys and values stay exact: what their codes cost, not a thing to build."""

    def read(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Decoded, but for massive vectors."""
        coded_keys, coded_values = self.dequantized()
        return (
            torch.where(massive(self.mapped(keys))[..., None], keys, coded_keys),
            torch.where(massive(values)[..., None], values, coded_values),
        )


def exact_massive(power: int) -> Patch:
    """`MassiveExact` with a key map estimated as `moment` does."""

    @contextmanager
    def patched() -> Iterator[None]:
        with simulated(MassiveExact)(), moment(power)():
            yield

    return patched


class ChannelSplit(Simulated):
    """The paper's outlier channels, after the key map, in place of 2-D grids (2.5 and 3.5 bits)."""

    def read(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Everything but the window through the split, with the scales of the product."""
        assert self.prefix is not None
        key_map, held = self.prefix.key_map, self.history.tokens
        coded = self._split(self.mapped(keys[:, :, :held]), "unbiased")
        coded = coded / key_map.scale[:, :, None] + key_map.mean[:, :, None]
        split = self._split(values[:, :, :held], "optimal")
        return torch.cat([coded, keys[:, :, held:]], 2), torch.cat([split, values[:, :, held:]], 2)

    def _split(self, x: Tensor, scale: Scale) -> Tensor:
        low, dim = int(self.policy.key_bits), x.shape[-1]
        # As many outlier channels as make the same payload: half of them.
        quantizer = OutlierSplit(dim, dim // 2, low + 1, low, scale=scale)
        channels = quantizer.choose_channels(x[:, :, : self.first])
        return quantizer.decode(quantizer.encode(x, channels))

    @property
    def first(self) -> int:
        """Tokens of the first chunk."""
        return self.chunks[0][0].shape[2]


class Recoded(Simulated):
    """All keys coded anew in every step, by a map of all of them: the best of running estimates."""

    energy: affine.QueryEnergy | None = None

    def attend(self, query: Tensor, **options: Any) -> Tensor:
        """Count the queries, too."""
        seen = affine.QueryEnergy.observe(query, None, self.window.keys.shape[1])
        self.energy = seen if self.energy is None else self.energy + seen
        return super().attend(query, **options)

    def read(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Decoded values, and keys but for the window through codes of a map of today."""
        held = self.history.tokens
        seen = torch.ones(len(keys), keys.shape[2], dtype=torch.bool)
        key_map = affine.estimate_key_map(keys, seen, self.energy, center=True, equalize=True)
        mean, scale = key_map.mean[:, :, None], key_map.scale[:, :, None]
        quantizer = TurboQuantMSE(keys.shape[-1], self.policy.key_bits, "unbiased")
        coded = quantizer.decode(quantizer.encode((keys[:, :, :held] - mean) * scale))
        _, all_values = self.dequantized()
        return torch.cat([coded / scale + mean, keys[:, :, held:]], 2), all_values
