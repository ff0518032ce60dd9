"""Tokens kept in the model's own dtype."""

import dataclasses
from typing import Any, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sixfold._surroundings import ordinary_tensors, outside_autocast
from sixfold.arguments import floating, plain_floats
from sixfold.errors import ShapeError, SixfoldError


def check_tokens(keys: Any, values: Any) -> None:
    """Refuse what are no keys and values of the same tokens.

    Raises:
        SixfoldError: One is no dense tensor of a floating dtype, or they are on different devices.
        ShapeError: They are not [batch, kv_heads, tokens, dim], alike but for `dim`.
    """
    for name, x in (("keys", keys), ("values", values)):
        if not plain_floats(x):
            floating(name, x)
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


# Tokens that there is room for when tokens are copied to be added to: many steps a copy, little
# memory that is not used.
GROWTH = 16


class Room:
    """Memory that tokens are added to in place. What was written once is never written again.

    Forks share it, in any thread: whoever is first to add tokens at its end does so, the others
    copy what they hold.

    Attributes:
        keys: Memory of the keys.
        values: Memory of the values.
    """

    def __init__(self, tokens: "DenseTokens", more: int) -> None:
        """Memory for `tokens`, which are copied to it, and `more` others."""
        held = tokens.keys.shape[2]
        capacity = -(-(held + more) // GROWTH) * GROWTH
        # Memory from inference mode could not be written to outside of it.
        with ordinary_tensors():
            self.keys, self.values = (
                x.new_empty(*x.shape[:2], capacity, x.shape[3])
                for x in (tokens.keys.detach(), tokens.values.detach())
            )
        # Written through these: graphs that hold views of what was written before need not know.
        self._written = self.keys.data, self.values.data
        # The end, for one to take: a single step of a dictionary needs no lock.
        self._ends = {0: True}
        self.add(0, tokens)

    def add(self, end: int, tokens: "DenseTokens") -> bool:
        """Write `tokens` from position `end` on; False where somebody has, or there is no room."""
        stop = end + tokens.keys.shape[2]
        keys, values = self._written
        closed = keys.is_inference() and not torch.is_inference_mode_enabled()
        if stop > keys.shape[2] or closed or self._ends.pop(end, None) is None:
            return False
        keys[:, :, end:stop] = tokens.keys
        values[:, :, end:stop] = tokens.values
        self._ends[stop] = True
        return True


@dataclasses.dataclass(frozen=True)
class DenseTokens:
    """Keys and values of consecutive tokens, in full precision.

    Attributes:
        keys: Keys in the model's dtype.
        values: Values.
        attended: Tokens that no mask has hidden from themselves; None if no mask was seen.
        room: What `keys` and `values` are part of, if they can grow in place.
        first: Where in it they begin.
    """

    keys: Float[Tensor, "batch kv_heads tokens key_dim"]
    values: Float[Tensor, "batch kv_heads tokens value_dim"]
    attended: Bool[Tensor, "batch tokens"] | None = None
    room: Room | None = None
    first: int = 0

    @property
    def tokens(self) -> int:
        """Tokens a sequence."""
        return self.keys.shape[2]

    def __getstate__(self) -> dict[str, Any]:
        # Copies of a room and of what is part of it would be twice the memory, and not the same.
        held = self if self.room is None else self.copy_slice(0, self.tokens)
        return dict(held.__dict__)

    def append(self, other: "DenseTokens") -> Self:
        """Both, in order; without a graph in place where there is room."""
        known = self.attended is not None or other.attended is not None
        attended = torch.cat([self.seen, other.seen], 1) if known else None
        if torch.is_grad_enabled():
            # Somebody may hold these tokens for a backward pass, which writing would spoil.
            keys = _joined(self.keys, other.keys)
            return type(self)(keys, _joined(self.values, other.values), attended)
        room, first = self.room, self.first
        held, new = self.keys.shape[2], other.keys.shape[2]
        if room is None or not room.add(first + held, other):
            room, first = Room(self, new), 0
            room.add(held, other)
        stop = first + held + new
        keys, values = room.keys[:, :, first:stop], room.values[:, :, first:stop]
        return type(self)(keys, values, attended, room, first)

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
        return dataclasses.replace(self, attended=attended)

    def unmasked(self) -> Self:
        """The same tokens, without what masks have shown."""
        return dataclasses.replace(self, attended=None)

    def slice(self, start: int, stop: int) -> Self:
        """A view of some tokens: for reading at once, not for keeping (it keeps all alive)."""
        attended = None if self.attended is None else self.attended[:, start:stop]
        return type(self)(self.keys[:, :, start:stop], self.values[:, :, start:stop], attended)

    def without_first(self, count: int) -> Self:
        """The tokens but for the first `count`, whose memory goes when these have grown."""
        if self.room is None or self.first + count > GROWTH:
            return self.copy_slice(count, self.tokens)
        rest = self.slice(count, self.tokens)
        return dataclasses.replace(rest, room=self.room, first=self.first + count)

    def copy_slice(self, start: int, stop: int) -> Self:
        """A copy of some tokens, which lets the memory of the others go."""
        view = self.slice(start, stop)
        attended = None if view.attended is None else view.attended.clone()
        return type(self)(view.keys.clone(), view.values.clone(), attended)

    def owned(self) -> Self:
        """The tokens without a graph and in memory of their own.

        Copied only if they are part of something larger that is not theirs to grow in.
        """
        if self.room is not None:
            return self
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


@outside_autocast
def _joined(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([x, y], 2)


def check_same(held: DenseTokens, new: DenseTokens) -> None:
    """Refuse new tokens that are not of the batch, heads, dims, dtypes and device of those held.

    Raises:
        ShapeError: They differ.
    """
    alike = True
    for old, fresh in ((held.keys, new.keys), (held.values, new.values)):
        (batch, heads, _, dim), shape = old.shape, fresh.shape
        alike &= shape[0] == batch and shape[1] == heads and shape[3] == dim
        alike &= old.dtype is fresh.dtype and old.device == fresh.device
    if alike:
        return
    if (had := _dtypes(held)) != (got := _dtypes(new)) and held.keys.device == new.keys.device:
        raise ShapeError(
            f"this layer holds keys and values of {had[0]} and {had[1]}, got {got[0]} and "
            f"{got[1]}: convert what it holds, as cache.to(dtype={got[0]}) does, when the "
            "dtype of the model changes."
        )
    for name in ("keys", "values"):
        expected, given = _kind(getattr(held, name)), _kind(getattr(new, name))
        if expected != given:
            raise ShapeError(
                f"{name}: this layer holds [batch, heads, dim], dtype, device = {expected}, got "
                f"{given}; reset the cache or select its batch rows before changing the batch."
            )


def _kind(x: Tensor) -> tuple[int, int, int, torch.dtype, torch.device]:
    batch, heads, _, dim = x.shape
    return batch, heads, dim, x.dtype, x.device


def _dtypes(tokens: DenseTokens) -> tuple[torch.dtype, torch.dtype]:
    return tokens.keys.dtype, tokens.values.dtype
