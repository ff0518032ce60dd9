"""Ways to compress that the product does not offer: values that its layers take."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from sixfold.cache.affine import (
    DEFAULT_FIT,
    KeyMapFit,
    QueryEnergy,
    equalizing_scale,
    estimate_key_map,
)
from sixfold.cache.code import MakeCode, PageCode, page_code
from sixfold.cache.policy import CachePolicy
from sixfold.kernels.attention import exact_attention
from sixfold.kernels.types import KeyMap, Pages, Past, Pool, Scale, Softmax, Tokens
from sixfold.packing import PAGE_TOKENS
from sixfold.quantizers import OutlierSplit, TurboQuantMSE

Vectors: TypeAlias = tuple[Tensor, Tensor]
"""Keys and values, [batch, heads, tokens, dim]."""

MASSIVE = 2.0
"""Norm of a massive key or value, in medians of its head."""


class Variant(NamedTuple):
    """How the layers of a cache code and fit."""

    make_code: MakeCode = page_code
    fit: KeyMapFit = DEFAULT_FIT


# Made for every layer, as some remember what their layer has seen.
MakeVariant: TypeAlias = Callable[[], Variant]


def scales(keys: Scale, values: Scale) -> MakeVariant:
    """Store these scales in place of the norms."""

    def make_code(policy: CachePolicy, key_dim: int, value_dim: int) -> PageCode:
        code = page_code(policy, key_dim, value_dim)
        return PageCode(
            dataclasses.replace(code.keys, scale=keys),
            dataclasses.replace(code.values, scale=values),
        )

    return lambda: Variant(make_code)


def fitted(**options: Any) -> Variant:
    """Key maps estimated with other `options` of `estimate_key_map`."""
    return Variant(fit=KeyMapFit(estimate=partial(estimate_key_map, **options)))


def moment(power: int) -> MakeVariant:
    """Estimate the spread of a key channel by the mean of its `power`-th power (even)."""
    return lambda: fitted(energy=partial(moment_energy, power=power))


def moment_energy(keys: Tensor, valid: Tensor, mean: Tensor, *, power: int) -> Tensor:
    """What stands for a channel's energy: the power of its `power`-th moment that is a square."""
    moved = (keys.float() - mean.unsqueeze(2)) ** power
    total = moved.where(valid[..., None], 0.0).sum(2)
    energy: Tensor = total.pow(2 / power)
    return energy


def shared_by_pairs() -> Variant:
    """One scale for both channels of a RoPE pair (i, i + dim/2), whose energies are added."""

    def shared(energy: Tensor) -> Tensor:
        first, second = energy.chunk(2, -1)
        return torch.cat([first + second] * 2, -1)

    def by_pairs(keys: Tensor, queries: Tensor | None) -> Tensor:
        return equalizing_scale(shared(keys), None if queries is None else shared(queries))

    return fitted(equalizing=by_pairs)


def first_tokens(count: int) -> MakeVariant:
    """Estimate the key map from the first `count` tokens alone, keys and queries."""

    def few(keys: Tensor, valid: Tensor, queries: Any, **options: Any) -> KeyMap:
        return estimate_key_map(keys, valid & (valid.cumsum(1) <= count), queries, **options)

    def seen(query: Tensor, valid: Tensor | None, kv_heads: int) -> QueryEnergy:
        first = None if valid is None else valid[:, :count]
        return QueryEnergy.observe(query[:, :, :count], first, kv_heads)

    return lambda: Variant(fit=KeyMapFit(seen, few))


def without_massive() -> Variant:
    """Leave tokens with a massive key in any head out of the estimate of the key map."""

    def ordinary(keys: Tensor, valid: Tensor, queries: Any, **options: Any) -> KeyMap:
        centred = keys - keys.median(2, keepdim=True).values
        return estimate_key_map(keys, valid & ~massive(centred).any(1), queries, **options)

    return Variant(fit=KeyMapFit(estimate=ordinary))


def massive(x: Tensor) -> Tensor:
    """Which vectors [batch, heads, tokens] are longer than `MASSIVE` medians of their head."""
    norms = torch.linalg.vector_norm(x.float(), dim=-1)
    longer: Tensor = norms > MASSIVE * norms.median(-1, keepdim=True).values
    return longer


def mapped(keys: Tensor, key_map: KeyMap) -> Tensor:
    """Keys as they are coded."""
    mean, scale, _ = key_map.of_sequences()
    return (keys - mean[:, :, None]) * scale[:, :, None]


def unmapped(keys: Tensor, key_map: KeyMap) -> Tensor:
    """What `mapped` was made of."""
    mean, scale, _ = key_map.of_sequences()
    return keys / scale[:, :, None] + mean[:, :, None]


@dataclasses.dataclass(kw_only=True)
class Simulated:
    """The product's code, beside which exact vectors are kept, for attention to see what it may.

    For caches that keep no sinks. What is kept is not counted: no cache would keep it.

    Attributes:
        policy: Of the layer.
        code: Of the policy.
        kept: Exact keys and values of every slot, by where the pool is.
    """

    policy: CachePolicy
    code: PageCode
    kept: dict[int, Vectors] = dataclasses.field(default_factory=dict)

    @classmethod
    def make(cls, policy: CachePolicy, key_dim: int, value_dim: int, **options: Any) -> "Simulated":
        """The same for a policy."""
        return cls(policy=policy, code=page_code(policy, key_dim, value_dim), **options)

    @property
    def page_bytes(self) -> tuple[int, int]:
        """See `Code.page_bytes`."""
        return self.code.page_bytes

    def tables(self, device: torch.device) -> list[Tensor]:
        """See `Code.tables`."""
        return self.code.tables(device)

    def on(self, device: torch.device) -> "Simulated":
        """See `Code.on`."""
        return dataclasses.replace(self, code=self.code.on(device))

    def store(
        self, keys: Tensor, values: Tensor, slots: Tensor, pool: Pool, key_map: KeyMap
    ) -> None:
        """See `Code.store`."""
        self.code.store(keys, values, slots, pool, key_map)
        where, memory = pool.key_codes.data_ptr(), pool.key_codes.shape[:2]
        exact = [x.unflatten(2, (-1, PAGE_TOKENS)).transpose(1, 2) for x in (keys, values)]
        held = self.kept.get(where)
        if held is None:
            new_keys, new_values = (x.new_empty(*memory, *x.shape[3:]) for x in exact)
            held = self.kept[where] = new_keys, new_values
        for target, x in zip(held, exact, strict=True):
            target[slots] = x

    def read(self, pages: Pages, dtype: torch.dtype, key_map: KeyMap) -> Vectors:
        """See `Code.read`."""
        return self.code.read(pages, dtype, key_map)

    def exact(self, pages: Pages) -> Vectors:
        """The vectors of `read` as they were."""
        held = self.kept[pages.pool.key_codes.data_ptr()]
        keys, values = (x[pages.slots].transpose(1, 2).flatten(2, 3) for x in held)
        return keys, values

    def attend(
        self,
        query: Tensor,
        tokens: Sequence[Tokens],
        past: Past,
        position: Tensor,
        softmax: Softmax,
    ) -> Tensor:
        """See `Code.attend`: to what `seen` makes of the tokens."""
        (window,) = tokens
        dtype, recent = window.keys.dtype, (window.keys, window.values)
        exact = joined([*(self.exact(part) for part in past.pages), recent])
        decoded = joined([*(self.read(part, dtype, past.key_map) for part in past.pages), recent])
        held = exact[0].shape[2] - window.keys.shape[2]
        keys, values = self.seen(query, exact, decoded, held, past.key_map)
        out: Tensor = exact_attention(query, keys, values, **softmax._asdict())
        return out

    def seen(
        self, query: Tensor, exact: Vectors, decoded: Vectors, held: int, key_map: KeyMap
    ) -> Vectors:
        """What attention sees of all tokens.

        Args:
            query: Queries of the newest tokens.
            exact: All tokens as they were.
            decoded: All tokens, those in pages decoded.
            held: How many are in pages.
            key_map: Of the pages.
        """
        return decoded


def joined(parts: list[Vectors]) -> Vectors:
    """Keys and values of consecutive tokens."""
    keys, values = (torch.cat(side, 2) for side in zip(*parts, strict=True))
    return keys, values


class MassiveExact(Simulated):
    """Massive keys and values stay exact: what their codes cost, not a thing to build."""

    def seen(
        self, query: Tensor, exact: Vectors, decoded: Vectors, held: int, key_map: KeyMap
    ) -> Vectors:
        """Decoded, but for massive vectors."""
        (keys, values), (coded_keys, coded_values) = exact, decoded
        return (
            torch.where(massive(mapped(keys, key_map))[..., None], keys, coded_keys),
            torch.where(massive(values)[..., None], values, coded_values),
        )


def exact_massive(power: int) -> MakeVariant:
    """`MassiveExact` with a key map estimated as `moment` does."""
    return lambda: moment(power)()._replace(make_code=MassiveExact.make)


@dataclasses.dataclass(kw_only=True)
class ChannelSplit(Simulated):
    """The paper's outlier channels, after the key map, in place of 2-D grids (2.5 and 3.5 bits).

    Attributes:
        first: Tokens by which the channels are chosen.
    """

    first: int

    def seen(
        self, query: Tensor, exact: Vectors, decoded: Vectors, held: int, key_map: KeyMap
    ) -> Vectors:
        """Everything but the window through the split, with the scales of the product."""
        keys, values = exact
        coded = self._split(mapped(keys[:, :, :held], key_map), "unbiased")
        split = self._split(values[:, :, :held], "optimal")
        return (
            torch.cat([unmapped(coded, key_map), keys[:, :, held:]], 2),
            torch.cat([split, values[:, :, held:]], 2),
        )

    def _split(self, x: Tensor, scale: Scale) -> Tensor:
        low, dim = int(self.policy.key_bits), x.shape[-1]
        # As many outlier channels as make the same payload: half of them.
        quantizer = OutlierSplit(dim, dim // 2, low + 1, low, scale=scale)
        channels = quantizer.choose_channels(x[:, :, : self.first])
        return quantizer.decode(quantizer.encode(x, channels))


def channel_split(first: int) -> MakeVariant:
    """`ChannelSplit` by the first tokens of a cache."""
    return lambda: Variant(partial(ChannelSplit.make, first=first))


class Asked:
    """All queries that a layer has been asked, the first ones as they were counted for its map."""

    def __init__(self) -> None:
        self.energy: QueryEnergy | None = None

    def estimate(
        self, keys: Tensor, valid: Tensor, queries: QueryEnergy | None, **options: Any
    ) -> KeyMap:
        """As `estimate_key_map`; a cache begins anew."""
        self.energy = queries
        return estimate_key_map(keys, valid, queries, **options)

    def add(self, query: Tensor, kv_heads: int) -> None:
        """Count the queries of a chunk."""
        new = QueryEnergy.observe(query, None, kv_heads)
        self.energy = new if self.energy is None else self.energy + new


@dataclasses.dataclass(kw_only=True)
class Recoded(Simulated):
    """All keys coded anew in every step, by a map of all of them: the best of running estimates.

    Attributes:
        asked: Queries so far.
    """

    asked: Asked

    def seen(
        self, query: Tensor, exact: Vectors, decoded: Vectors, held: int, key_map: KeyMap
    ) -> Vectors:
        """Decoded values, and keys but for the window through codes of a map of today."""
        keys, (_, values) = exact[0], decoded
        self.asked.add(query, keys.shape[1])
        valid = torch.ones(len(keys), keys.shape[2], dtype=torch.bool)
        today = estimate_key_map(keys, valid, self.asked.energy, center=True, equalize=True)
        quantizer = TurboQuantMSE(keys.shape[-1], self.policy.key_bits, "unbiased")
        coded = quantizer.decode(quantizer.encode(mapped(keys[:, :, :held], today)))
        return torch.cat([unmapped(coded, today), keys[:, :, held:]], 2), values


def recoded() -> Variant:
    """`Recoded`, with the queries that its layer is asked."""
    asked = Asked()
    return Variant(partial(Recoded.make, asked=asked), KeyMapFit(estimate=asked.estimate))
