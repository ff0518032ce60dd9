"""Codes that are only imitated: attention sees what they would decode, no bytes are written.

Everything else is the product's: windows, sinks, pages, the key map that a layer fits, and the
bytes that a cache counts, which are those of the product's code at the same widths.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from sixfold.cache.affine import KeyMapFit, QueryEnergy, estimate_key_map
from sixfold.cache.code import Code, PageCode, page_code
from sixfold.cache.policy import CachePolicy
from sixfold.kernels._narrow import narrow
from sixfold.kernels.attention import dense_attention, merge_partials, with_sinks
from sixfold.kernels.attention.parts import visible_tokens
from sixfold.kernels.attention.reference import page_positions
from sixfold.kernels.types import KeyMap, Pages, Past, Pool, Softmax, Tokens
from sixfold.packing import PAGE_TOKENS

Coded: TypeAlias = Callable[[Float[Tensor, "kv_heads tokens dim"]], Float32[Tensor, "..."]]
"""Vectors to what their codes decode to."""


@dataclasses.dataclass(frozen=True)
class Beginning:
    """What a layer has seen when its first pages are written.

    Attributes:
        keys: Of those pages, without sinks.
        values: Likewise.
        asked: Second moment of the queries of every KV head, summed.
        key_map: Fitted to the same tokens.
        output: Second moment of the columns of the output projection that read each KV head.
    """

    keys: Float32[Tensor, "kv_heads tokens key_dim"]
    values: Float32[Tensor, "kv_heads tokens value_dim"]
    asked: Float32[Tensor, "kv_heads key_dim key_dim"]
    key_map: KeyMap
    output: Float32[Tensor, "kv_heads value_dim value_dim"]


Fit: TypeAlias = Callable[[Beginning, float], Coded]
"""From what a layer has seen, and bits a coordinate."""


@dataclasses.dataclass(frozen=True)
class Moments(QueryEnergy):
    """Energy of queries, with their second moment."""

    products: Float32[Tensor, "batch kv_heads dim dim"]

    @classmethod
    def observe(cls, query: Tensor, valid: Tensor | None, kv_heads: int) -> "Moments":
        """See `QueryEnergy.observe`."""
        energy = QueryEnergy.observe(query, valid, kv_heads)
        grouped = query.float().unflatten(1, (kv_heads, -1)).flatten(2, 3)
        return cls(energy.squares, grouped.mT @ grouped)

    def __add__(self, other: QueryEnergy) -> "Moments":
        assert isinstance(other, Moments)
        return Moments(self.squares + other.squares, self.products + other.products)


@dataclasses.dataclass(kw_only=True)
class Imitated:
    """Keys and values of one sequence, each through a code fitted to its beginning.

    Attributes:
        policy: Of the layer.
        code: The product's code of that policy, for its bytes.
        fits: How keys, and values, are coded.
        output: See `Beginning`.
        asked: Set by the fit of the key map, before anything is stored.
        codings: Fitted when the first pages are stored.
        kept: What pages decode to, by where the pool is and their slot.
    """

    policy: CachePolicy
    code: PageCode
    fits: tuple[Fit, Fit]
    output: Tensor
    asked: Tensor | None = None
    codings: tuple[Coded, Coded] | None = None
    kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = dataclasses.field(default_factory=dict)

    @property
    def page_bytes(self) -> tuple[int, int]:
        """See `Code.page_bytes`."""
        return self.code.page_bytes

    def tables(self, device: torch.device) -> list[Tensor]:
        """See `Code.tables`."""
        return self.code.tables(device)

    def on(self, device: torch.device) -> "Imitated":
        """See `Code.on`."""
        return self

    def estimate(self, keys: Tensor, valid: Tensor, queries: Moments, **options: Any) -> KeyMap:
        """The product's key map; what was asked is remembered for the code."""
        self.asked = queries.products[0]
        return estimate_key_map(keys, valid, queries, **options)

    @property
    def fit(self) -> KeyMapFit:
        """Of the layer's key map."""
        return KeyMapFit(Moments.observe, self.estimate)

    def store(
        self, keys: Tensor, values: Tensor, slots: Tensor, pool: Pool, key_map: KeyMap
    ) -> None:
        """See `Code.store`."""
        vectors = keys[0].float(), values[0].float()
        if self.codings is None:
            assert self.asked is not None
            policy, (key_fit, value_fit) = self.policy, self.fits
            later_keys, later_values = (x[:, policy.sink_tokens :] for x in vectors)
            begun = Beginning(later_keys, later_values, self.asked, key_map, self.output)
            self.codings = key_fit(begun, policy.key_bits), value_fit(begun, policy.value_bits)
        coded = [make(x) for make, x in zip(self.codings, vectors, strict=True)]
        pages = zip(*(x.split(PAGE_TOKENS, 1) for x in coded), strict=True)
        self.kept |= dict(zip(_places(pool, slots), pages, strict=True))

    def read(self, pages: Pages, dtype: torch.dtype, key_map: KeyMap) -> tuple[Tensor, Tensor]:
        """See `Code.read`."""
        held = [self.kept[place] for place in _places(pages.pool, pages.slots)]
        keys, values = (torch.cat(side, 1)[None].to(dtype) for side in zip(*held, strict=True))
        return keys, values

    def attend(self, *arguments: Any) -> Tensor:
        """See `Code.attend`."""
        return _attend_decoded(self, *arguments)


def _attend_decoded(
    code: Code,
    query: Float[Tensor, "batch heads queries key_dim"],
    tokens: Sequence[Tokens],
    past: Past,
    position: Int64[Tensor, " batch"],
    softmax: Softmax,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """`Code.attend` for codes that have no kernels for it: on decoded pages, in float32."""
    own = position[:, None] + torch.arange(query.shape[2], device=query.device)
    held = [visible_tokens(part) for part in (*past.kept, *tokens)]
    for part in past.pages:
        found = page_positions(part)
        found = found.masked_fill(found < past.start[:, None], -1)
        held.append((*code.read(part, torch.float32, past.key_map), found))
    parts = [
        dense_attention(
            query,
            *vectors,
            own,
            scaling=softmax.scaling,
            mask=softmax.mask,
            sliding_window=softmax.sliding_window,
            softcap=softmax.softcap,
        )
        for vectors in held
    ]
    return narrow(with_sinks(merge_partials(parts), softmax.sink_logits).out, query.dtype)


def _places(pool: Pool, slots: Tensor) -> list[tuple[int, int]]:
    where = pool.key_codes.data_ptr()
    return [(where, slot) for slot in slots[0].tolist()]


def imitated(policy: CachePolicy, fits: tuple[Fit, Fit], output: Tensor) -> Imitated:
    """The code of one layer."""
    dims = output.shape[-1]
    return Imitated(policy=policy, code=page_code(policy, dims, dims), fits=fits, output=output)
