"""The key map of an engine's layer, from its first page to the last that it is fitted to."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sixfold.cache.affine import QueryEnergy, estimate_key_map
from sixfold.cache.policy import CachePolicy
from sixfold.kernels.types import KeyMap
from sixfold.packing import PAGE_TOKENS

# From so many pages on, another text changes a map little (docs/key_map.md).
ENOUGH = 16


class RawPage(NamedTuple):
    """A page that is coded, as it was.

    Attributes:
        keys: Its keys.
        values: Its values.
        begins: Whether it is the first of its sequence: only to be compared with False on a host.
    """

    keys: Float[Tensor, "kv_heads 64 key_dim"]
    values: Float[Tensor, "kv_heads 64 value_dim"]
    begins: Bool[Tensor, ""]


class Learning:
    """Fits a key map to the first full pages, and again whenever twice as many have been seen.

    The first that a server is asked may be a greeting, and the map of its 64 tokens costs half as
    much KL again in all that follows. So pages stay here raw as well until enough were seen: by
    every new map they are encoded again. An engine that gives a block to somebody else must say so
    (`forget`).
    """

    def __init__(self, policy: CachePolicy, kv_heads: int, enough: int = ENOUGH) -> None:
        """See the class; the map is kept from so many pages on."""
        self._policy, self._kv_heads, self._enough = policy, kv_heads, enough
        self._energy: QueryEnergy | None = None
        self._pages: dict[int, RawPage] = {}
        self._seen, self._due = 0, 1

    @property
    def done(self) -> bool:
        """Whether the last map is the one to keep."""
        return self._seen >= self._enough

    def observe(self, query: Float[Tensor, "tokens heads dim"], begins: bool) -> None:
        """Count the queries of a step; `begins`: those of new sequences alone."""
        if begins and not self._seen:
            # Of whom the queries before were (an engine that warms up, say) asks no longer.
            self._energy = None
        energy = QueryEnergy.observe(query.transpose(0, 1)[None], None, self._kv_heads)
        self._energy = energy if self._energy is None else self._energy + energy

    def fit(
        self,
        keys: Sequence[Float[Tensor, "_ kv_heads _ dim"]],
        begins: Bool[Tensor, " pages"],
    ) -> KeyMap | None:
        """A map for pages that are to be coded and those that are, if it is time for one.

        Args:
            keys: Keys of the former, whole pages.
            begins: Which of them are the first of a sequence: their attention sinks do not count.
        """
        self._seen += len(begins)
        if self._seen < self._due:
            return None
        self._due = min(2 * self._seen, self._enough)
        held = self._pages.values()
        pieces = [*keys, *(x.keys[None] for x in held)]
        together = torch.cat([x.transpose(0, 1).flatten(1, 2) for x in pieces], 1)[None]
        begins = torch.stack([*begins, *(x.begins for x in held)])
        seen = torch.ones(len(begins), PAGE_TOKENS, dtype=torch.bool, device=together.device)
        # With a mask for an index it would wait for a GPU.
        seen[:, : self._policy.sink_tokens] &= ~begins[:, None]
        center, equalize = self._policy.center_keys, self._policy.equalize_keys
        return estimate_key_map(
            together, seen.view(1, -1), self._energy, center=center, equalize=equalize
        )

    def coded(self) -> Iterator[tuple[int, RawPage]]:
        """The pages that are coded, and in which block."""
        yield from self._pages.items()

    def keep(
        self,
        slots: Sequence[int],
        keys: Iterable[Float[Tensor, "_ kv_heads _ key_dim"]],
        values: Iterable[Float[Tensor, "_ kv_heads _ value_dim"]],
        begins: Bool[Tensor, " pages"],
    ) -> None:
        """Remember pages that are coded in these blocks now; tensors are copied."""
        pages = zip(_pages(keys), _pages(values), begins, strict=True)
        for slot, page in zip(slots, pages, strict=True):
            self._pages[slot] = RawPage(*(x.clone() for x in page))

    def forget(self, slots: Iterable[int]) -> None:
        """Blocks that hold something else now."""
        for slot in slots:
            self._pages.pop(slot, None)


def _pages(x: Iterable[Tensor]) -> Iterator[Tensor]:
    """Page by page, [heads, 64, dim], of pieces [batch, heads, tokens, dim]."""
    for piece in x:
        yield from piece.unflatten(2, (-1, PAGE_TOKENS)).transpose(1, 2).flatten(0, 1)
