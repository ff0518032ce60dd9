"""How the tokens of a layer become pages of codes, and what is done with the pages: a value.

A layer knows nothing of codes but what `Code` says, so that another code (of a study, or a better
one) is passed to it and nothing is patched.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sixfold.cache.coder import Coder, coders
from sixfold.cache.policy import CachePolicy
from sixfold.kernels.attention import attention
from sixfold.kernels.decode import decode_pages
from sixfold.kernels.encode import store_pages
from sixfold.kernels.types import Coding, KeyMap, Pages, Past, Pool, Softmax, Tokens


@runtime_checkable
class Code(Protocol):
    """What a layer asks of a code."""

    @property
    def page_bytes(self) -> tuple[int, int]:
        """Bytes of one head's codes of a page, of keys and of values, without scales."""

    def tables(self, device: torch.device) -> list[Tensor]:
        """Every tensor that coding needs beside the pages."""

    def on(self, device: torch.device) -> "Code":
        """The same with its tables at hand: for callers that are traced."""

    def store(
        self,
        keys: Float[Tensor, "batch kv_heads tokens key_dim"],
        values: Float[Tensor, "batch kv_heads tokens value_dim"],
        slots: Int64[Tensor, "batch pages"],
        pool: Pool,
        key_map: KeyMap,
    ) -> None:
        """Encode whole pages, keys mapped before, and write them where `slots` says."""

    def read(
        self, pages: Pages, dtype: torch.dtype, key_map: KeyMap
    ) -> tuple[
        Float[Tensor, "batch kv_heads tokens key_dim"],
        Float[Tensor, "batch kv_heads tokens value_dim"],
    ]:
        """Decode pages, 64 tokens each, and undo the map."""

    def attend(
        self,
        query: Float[Tensor, "batch heads queries key_dim"],
        tokens: Sequence[Tokens],
        past: Past,
        position: Int64[Tensor, " batch"],
        softmax: Softmax,
    ) -> Float[Tensor, "batch heads queries value_dim"]:
        """See `sixfold.kernels.attention`."""


MakeCode: TypeAlias = Callable[[CachePolicy, int, int], Code]
"""From a policy and the dimensions of keys and values."""


@dataclasses.dataclass(frozen=True)
class PageCode:
    """One coder for keys, one for values: the code of the product.

    Attributes:
        keys: How keys are coded.
        values: How values are coded.
        made: Their tables, where what makes them cannot be traced.
    """

    keys: Coder
    values: Coder
    made: tuple[Coding, Coding] | None = None

    @property
    def page_bytes(self) -> tuple[int, int]:
        """See `Code.page_bytes`."""
        return self.keys.page_bytes, self.values.page_bytes

    def tables(self, device: torch.device) -> list[Tensor]:
        """See `Code.tables`."""
        return self.keys.tables(device) + self.values.tables(device)

    def on(self, device: torch.device) -> "PageCode":
        """See `Code.on`."""
        return dataclasses.replace(self, made=self._codings(device))

    def _codings(self, device: torch.device) -> tuple[Coding, Coding]:
        return self.made or (self.keys.coding(device), self.values.coding(device))

    def store(
        self, keys: Tensor, values: Tensor, slots: Tensor, pool: Pool, key_map: KeyMap
    ) -> None:
        """See `Code.store`."""
        store_pages(keys, values, slots, pool, *self._codings(keys.device), key_map)

    def read(self, pages: Pages, dtype: torch.dtype, key_map: KeyMap) -> tuple[Tensor, Tensor]:
        """See `Code.read`."""
        pool, slots = pages.pool, pages.slots
        keys, values = self._codings(slots.device)
        return (
            decode_pages(*pool[:2], slots, keys, "key", dtype, key_map),
            decode_pages(*pool[2:], slots, values, "value", dtype),
        )

    def attend(
        self,
        query: Tensor,
        tokens: Sequence[Tokens],
        past: Past,
        position: Tensor,
        softmax: Softmax,
    ) -> Tensor:
        """See `Code.attend`: on the codes."""
        codings = self._codings(query.device)
        out: Tensor = attention(query, tokens, past, *codings, position, softmax)
        return out


def page_code(policy: CachePolicy, key_dim: int, value_dim: int) -> PageCode:
    """The code of a policy."""
    return PageCode(*coders(policy, key_dim, value_dim))
