"""What is fixed once for a sequence, when its first tokens are compressed."""

import dataclasses
from typing import Self

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sixfold.cache.affine import KeyMapFit, QueryEnergy
from sixfold.cache.dense import DenseTokens
from sixfold.cache.masks import leading_hidden
from sixfold.cache.policy import CachePolicy
from sixfold.kernels.types import KeyMap, Mask, Tokens


@dataclasses.dataclass(frozen=True)
class Prefix:
    """The sinks and the key map of every sequence of the batch.

    Attributes:
        sinks: The first tokens after the padding, in the model's dtype.
        padding: Left-padding of every sequence, in tokens.
        end: Position after the last sink: earlier ones are never read from codes or window.
        key_map: Centring and equalization.
        assumed: Whether the padding is what keys look like, and no mask has shown any.
        part: The sinks as kernels take them; none if none are kept.
    """

    sinks: DenseTokens
    padding: Int64[Tensor, " batch"]
    end: Int64[Tensor, " batch"]
    key_map: KeyMap
    assumed: bool = False
    part: tuple[Tokens, ...] = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        sinks = Tokens(self.sinks.keys, self.sinks.values, self.padding, self.padding, self.end)
        object.__setattr__(self, "part", (sinks,) if self.sinks.tokens else ())

    @classmethod
    def fix(
        cls,
        tokens: DenseTokens,
        padding: Int64[Tensor, " batch"],
        key_map: KeyMap,
        sink_tokens: int,
        assumed: bool = False,
    ) -> Self:
        """Copy the sinks of `tokens`, the first of every sequence, after its padding."""
        last = tokens.tokens - 1
        slots = torch.arange(sink_tokens, device=padding.device)
        count = (tokens.tokens - padding).clamp(0, sink_tokens)
        sinks = tokens.gather((padding[:, None] + slots).clamp(max=last))
        return cls(sinks, padding, padding + count, key_map, assumed)

    def settled(self, mask: Mask | None) -> Self:
        """The same once it is attended: what was assumed to be padding, and is not hidden, is none.

        Its sinks are read as codes then, like the tokens before them: there is no other place for
        what attention on codes leaves out.
        """
        hidden = torch.zeros_like(self.padding) if mask is None else leading_hidden(mask)
        real = self.padding > hidden
        padding, end = (x.masked_fill(real, 0) for x in (self.padding, self.end))
        return dataclasses.replace(self, padding=padding, end=end, assumed=False)

    @property
    def count(self) -> Int64[Tensor, " batch"]:
        """Sinks that exist, fewer than kept only in a sequence that short."""
        return self.end - self.padding

    def positions(self) -> Int64[Tensor, "batch sinks"]:
        """Position of every sink; -1 where a short sequence has none."""
        slots = torch.arange(self.sinks.tokens, device=self.padding.device)
        return (self.padding[:, None] + slots).masked_fill(slots >= self.count[:, None], -1)

    def overwrite(self, x: Float[Tensor, "batch kv_heads tokens dim"], sinks: Tensor) -> None:
        """Put the exact `sinks` back where `x` holds their decoded codes."""
        for slot, positions in enumerate(self.positions().unbind(1)):
            rows = ((positions >= 0) & (positions < x.shape[2])).nonzero().flatten()
            x[rows, :, positions[rows]] = sinks[rows, :, slot].to(x.dtype)

    def crop(self, tokens: int) -> Self:
        """The prefix of sequences cut to `tokens` tokens."""
        padding, end = self.padding.clamp(max=tokens), self.end.clamp(max=tokens)
        return dataclasses.replace(self, padding=padding, end=end)

    def evict(self, tokens: int) -> Self:
        """The prefix of sequences whose first `tokens` tokens are forgotten."""
        padding = (self.padding - tokens).clamp(min=0)
        return dataclasses.replace(self, padding=padding, end=padding + self.count)

    def select(self, rows: Tensor) -> Self:
        """The prefix of other sequences of the batch."""
        return type(self)(
            self.sinks.select(rows),
            self.padding[rows],
            self.end[rows],
            self.key_map.select(rows),
            self.assumed,
        )

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        sinks = self.sinks
        return [sinks.keys, sinks.values, self.padding, self.end, *self.key_map.tensors()]

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Self:
        """The same on another device, sinks in another dtype if one is given."""
        return type(self)(
            self.sinks.to(device, dtype),
            self.padding.to(device),
            self.end.to(device),
            self.key_map.to(device),
            self.assumed,
        )


def fitted_map(
    tokens: DenseTokens,
    padding: Int64[Tensor, " batch"],
    queries: QueryEnergy | None,
    policy: CachePolicy,
    sink_tokens: int,
    fit: KeyMapFit,
) -> KeyMap:
    """A key map for every sequence, fitted to the tokens seen so far: no padding, no sinks."""
    positions = torch.arange(tokens.tokens, device=padding.device)
    begun = tokens.seen & (positions >= padding[:, None])
    count = (tokens.tokens - padding).clamp(0, sink_tokens)
    counted = begun & (positions >= (padding + count)[:, None])
    # Of a sequence that has nothing else the sinks say where its keys are.
    counted = torch.where(counted.any(1, keepdim=True), counted, begun)
    return fit.estimate(
        tokens.keys,
        counted,
        queries,
        center=policy.center_keys,
        equalize=policy.equalize_keys,
    )
