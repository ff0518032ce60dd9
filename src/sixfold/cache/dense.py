"""Tokens kept in the model's own dtype."""

import dataclasses
from typing import Any, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sixfold.arguments import floating
from sixfold.errors import ShapeError, SixfoldError


def check_tokens(keys: Any, values: Any) -> None:
    """Refuse what are no keys and values of the same tokens.

    Raises:
        SixfoldError: One is no dense tensor of a floating dtype, or they are on different devices.
        ShapeError: They are not [batch, kv_heads, tokens, dim], alike but for `dim`.
    """
    floating("keys", keys)
    floating("values", values)
    shape, other = keys.shape, values.shape
    if len(shape) != 4 or len(other) != 4 or shape[:2] != other[:2]:
        raise ShapeError(
            "expected keys and a value for every key, both [batch, kv_heads, tokens, dim], got "
            f"keys {list(shape)} and values {list(other)}."
        )
    if shape[2] != other[2]:
        raise ShapeError(
            f"expected a value for every key, got {shape[2]} keys and {other[2]} values a sequence."
        )
    if keys.device != values.device:
        raise SixfoldError(
            f"keys are on {keys.device} and values on {values.device}: move one with .to()."
        )


@dataclasses.dataclass(frozen=True)
class DenseTokens:
    """Keys and values of consecutive tokens, in full precision.

    Attributes:
        keys: Keys in the model's dtype.
        values: Values.
        attended: Tokens that no mask has hidden from themselves; None if no mask was seen.
    """

    keys: Float[Tensor, "batch kv_heads tokens key_dim"]
    values: Float[Tensor, "batch kv_heads tokens value_dim"]
    attended: Bool[Tensor, "batch tokens"] | None = None

    @property
    def tokens(self) -> int:
        """Tokens a sequence."""
        return self.keys.shape[2]

    def append(self, other: "DenseTokens") -> Self:
        """Both, in order."""
        known = self.attended is not None or other.attended is not None
        return type(self)(
            torch.cat([self.keys, other.keys], 2),
            torch.cat([self.values, other.values], 2),
            torch.cat([self.seen, other.seen], 1) if known else None,
        )

    @property
    def seen(self) -> Bool[Tensor, "batch tokens"]:
        """`attended`, without a mask every token."""
        if self.attended is not None:
            return self.attended
        batch, _, tokens, _ = self.keys.shape
        return torch.ones(batch, tokens, dtype=torch.bool, device=self.keys.device)

    def masked(self, newest: Bool[Tensor, "batch new"]) -> Self:
        """The same tokens, the newest of them attended where `newest` says so."""
        attended = torch.cat([self.seen[:, : self.tokens - newest.shape[1]], newest], 1)
        return type(self)(self.keys, self.values, attended)

    def unmasked(self) -> Self:
        """The same tokens, without what masks have shown."""
        return type(self)(self.keys, self.values)

    def slice(self, start: int, stop: int) -> Self:
        """A view of some tokens: for reading at once, not for keeping (it keeps all alive)."""
        attended = None if self.attended is None else self.attended[:, start:stop]
        return type(self)(self.keys[:, :, start:stop], self.values[:, :, start:stop], attended)

    def copy_slice(self, start: int, stop: int) -> Self:
        """A copy of some tokens, which lets the memory of the others go."""
        view = self.slice(start, stop)
        attended = None if view.attended is None else view.attended.clone()
        return type(self)(view.keys.clone(), view.values.clone(), attended)

    def owned(self) -> Self:
        """The tokens without a graph and in memory of their own.

        Copied only if they are part of something larger.
        """
        whole = all(x.untyped_storage().nbytes() == x.nbytes for x in (self.keys, self.values))
        kept = self if whole else self.copy_slice(0, self.tokens)
        if not (kept.keys.requires_grad or kept.values.requires_grad):
            return kept
        return type(self)(kept.keys.detach(), kept.values.detach(), kept.attended)

    def gather(self, positions: Tensor) -> Self:
        """Tokens at per-sequence `positions` [batch n]."""
        index = positions[:, None, :, None]

        def pick(x: Tensor) -> Tensor:
            return x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))

        return type(self)(pick(self.keys), pick(self.values))

    def select(self, rows: Tensor) -> Self:
        """The tokens of other sequences of the batch."""
        attended = None if self.attended is None else self.attended[rows]
        return type(self)(self.keys[rows], self.values[rows], attended)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Self:
        """The same tokens on another device, in another dtype if one is given."""
        attended = None if self.attended is None else self.attended.to(device)
        return type(self)(self.keys.to(device, dtype), self.values.to(device, dtype), attended)

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        held = [self.keys, self.values]
        return held if self.attended is None else [*held, self.attended]
