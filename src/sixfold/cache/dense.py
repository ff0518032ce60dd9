"""Tokens kept in the model's own dtype."""

import dataclasses
from typing import Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

TOKENS_PER_BLOCK = 512
# Of the squared norm: above what bfloat16 rounds off, far below the distance of two tokens.
REPEAT_DISTANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class DenseTokens:
    """Keys and values of consecutive tokens, in full precision."""

    keys: Float[Tensor, "batch kv_heads tokens key_dim"]
    values: Float[Tensor, "batch kv_heads tokens value_dim"]

    @property
    def tokens(self) -> int:
        """Tokens a sequence."""
        return self.keys.shape[2]

    def append(self, other: "DenseTokens") -> Self:
        """Both, in order."""
        return type(self)(
            torch.cat([self.keys, other.keys], 2), torch.cat([self.values, other.values], 2)
        )

    def slice(self, start: int, stop: int) -> Self:
        """A view of some tokens: for reading at once, not for keeping (it keeps all alive)."""
        return type(self)(self.keys[:, :, start:stop], self.values[:, :, start:stop])

    def copy_slice(self, start: int, stop: int) -> Self:
        """A copy of some tokens, which lets the memory of the others go."""
        view = self.slice(start, stop)
        return type(self)(view.keys.clone(), view.values.clone())

    def owned(self) -> Self:
        """The tokens without a graph and in memory of their own.

        Copied only if they are part of something larger.
        """
        whole = all(x.untyped_storage().nbytes() == x.nbytes for x in (self.keys, self.values))
        if not whole:
            return self.copy_slice(0, self.tokens)
        return type(self)(self.keys.detach(), self.values.detach())

    def gather(self, positions: Tensor) -> Self:
        """Tokens at per-sequence `positions` [batch n]."""
        index = positions[:, None, :, None]

        def pick(x: Tensor) -> Tensor:
            return x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))

        return type(self)(pick(self.keys), pick(self.values))

    def repeats(self) -> Bool[Tensor, "batch tokens"]:
        """Tokens that say nothing new: key or value is that of the token before, but for rounding.

        Left padding looks like that where no mask shows it, and so do runs of one token.
        """
        return _repeats(self.keys) | _repeats(self.values)

    def select(self, rows: Tensor) -> Self:
        """The tokens of other sequences of the batch."""
        return type(self)(self.keys[rows], self.values[rows])

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Self:
        """The same tokens on another device, in another dtype if one is given."""
        return type(self)(self.keys.to(device, dtype), self.values.to(device, dtype))


def _repeats(x: Float[Tensor, "batch kv_heads tokens dim"]) -> Bool[Tensor, "batch tokens"]:
    repeated = [x.new_zeros(x.shape[0], 1, dtype=torch.bool)]
    for start in range(1, x.shape[2], TOKENS_PER_BLOCK):
        stop = min(start + TOKENS_PER_BLOCK, x.shape[2])
        block = x[:, :, start:stop].float()
        moved = (block - x[:, :, start - 1 : stop - 1].float()).square().sum((1, 3))
        repeated.append(moved <= REPEAT_DISTANCE * block.square().sum((1, 3)))
    return torch.cat(repeated, 1)[:, : x.shape[2]]
