"""The key map of an engine's layer, from its first page to the last that it is fitted to."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from sixfold.cache.affine import QueryEnergy, estimate_key_map
from sixfold.cache.policy import CachePolicy
from sixfold.cache.transfer import to_device
from sixfold.kernels.types import KeyMap
from sixfold.packing import PAGE_TOKENS

# From so many pages on, more of them change a map little (docs/key_map.md).
ENOUGH = 16
# Enough to tell which channels are strong: a server of short chats fills no page for long.
MOST_QUERIES = 4096


class Learning:
    """Fits a key map to the first full pages, and again whenever twice as many have been seen.

    The first that a server is asked may be a greeting, of which 64 tokens say little about what
    follows. So pages stay here raw as well until enough were seen: by a new map they are encoded
    again. An engine that gives a block to somebody else must say so (`forget`).

    Attributes:
        stale: Whether there is a map that they have not been encoded by yet.
    """

    def __init__(self, policy: CachePolicy, kv_heads: int, enough: int = ENOUGH) -> None:
        """See the class; the map is kept from so many pages on."""
        self._policy, self._kv_heads, self._enough = policy, kv_heads, enough
        self._energy: QueryEnergy | None = None
        self._asked = 0
        # Keys of each page that maps are fitted to, and whether it begins a sequence.
        self._seen: list[tuple[Tensor, Tensor]] = []
        # Keys and values of those that are coded still, by their block.
        self._coded: dict[int, tuple[Tensor, Tensor]] = {}
        self._pages, self._due = 0, 1
        self.stale = False

    @property
    def done(self) -> bool:
        """Whether the last map is the one to keep."""
        return self._pages >= self._enough

    def observe(self, query: Float[Tensor, "tokens heads dim"], begins: bool) -> None:
        """Count the queries of a step; `begins`: those of new sequences alone."""
        if begins and not self._pages:
            # Of whom the queries before were (an engine that warms up, say) asks no longer.
            self._energy, self._asked = None, 0
        if self._asked >= MOST_QUERIES:
            return
        self._asked += len(query)
        energy = QueryEnergy.observe(query.transpose(0, 1)[None], None, self._kv_heads)
        self._energy = energy if self._energy is None else self._energy + energy

    def fit(
        self, keys: Sequence[Float[Tensor, "_ kv_heads _ dim"]], begins: Bool[Tensor, " pages"]
    ) -> KeyMap | None:
        """A map for pages that are to be coded and those that are, if it is time for one.

        Args:
            keys: Keys of the former, whole pages.
            begins: Which of them are the first of a sequence: their attention sinks do not count.
        """
        if self._pages + len(begins) < self._due:
            return None
        pieces = [*keys, *(x[None] for x, _ in self._seen)]
        together = torch.cat([x.transpose(0, 1).flatten(1, 2) for x in pieces], 1)[None]
        begins = torch.stack([*begins, *(first for _, first in self._seen)])
        counted = torch.ones(len(begins), PAGE_TOKENS, dtype=torch.bool, device=together.device)
        # With a mask for an index it would wait for a GPU.
        counted[:, : self._policy.sink_tokens] &= ~begins[:, None]
        center, equalize = self._policy.center_keys, self._policy.equalize_keys
        return estimate_key_map(
            together, counted.view(1, -1), self._energy, center=center, equalize=equalize
        )

    def count(self, pages: int) -> None:
        """So many more pages are coded."""
        self._pages += pages
        if self._pages >= self._due:
            self._due = min(2 * self._pages, self._enough)

    def keep(
        self,
        slots: Sequence[int],
        keys: Iterable[Float[Tensor, "_ kv_heads _ key_dim"]],
        values: Iterable[Float[Tensor, "_ kv_heads _ value_dim"]],
        begins: Bool[Tensor, " pages"],
    ) -> None:
        """Remember pages that are coded in these blocks now; tensors are copied."""
        pages = zip(slots, _pages(keys), _pages(values), begins, strict=True)
        for slot, own_keys, own_values, first in pages:
            own_keys = own_keys.clone()
            self._seen.append((own_keys, first.clone()))
            self._coded[slot] = own_keys, own_values.clone()

    def coded(
        self,
    ) -> (
        tuple[
            Float[Tensor, "pages kv_heads 64 key_dim"],
            Float[Tensor, "pages kv_heads 64 value_dim"],
            Int64[Tensor, "pages 1"],
        ]
        | None
    ):
        """Keys, values and blocks of all pages that are coded, if there are any."""
        if not self._coded:
            return None
        keys, values = (torch.stack(x) for x in zip(*self._coded.values(), strict=True))
        return keys, values, to_device(np.array([*self._coded])[:, None], keys.device)

    def forget(self, slots: Iterable[int]) -> None:
        """Blocks that hold something else now."""
        for slot in slots:
            self._coded.pop(slot, None)


def _pages(x: Iterable[Tensor]) -> Iterator[Tensor]:
    """Page by page, [heads, 64, dim], of pieces [batch, heads, tokens, dim]."""
    for piece in x:
        yield from piece.unflatten(2, (-1, PAGE_TOKENS)).transpose(1, 2).flatten(0, 1)
