"""Centring and equalization of keys: an exact affine map, estimated online (docs/key_map.md).

A key is stored as ``k' = (k - mean)·scale``, a query asks with ``q' = q/scale``, so that
``q·k = q'·k' + q·mean``: nothing is approximated here, only made easier to quantize.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Self

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

# Channels whose scale lies within a factor of sqrt(2) of their head's median stay as they are: what
# repairs outlier channels must cost nothing where there are none (measured in docs/key_map.md).
DEAD_ZONE = math.log(2) / 2
MAX_LOG_SCALE = 5.0  # keeps silent channels (no spread at all) finite
MIN_TOKENS = 16  # fewer say too little about a channel's spread
# Far beyond what float16 scales hold; its fourth power, summed, stays finite in float32.
MAX_KEY = 2.0**24
TOKENS_PER_BLOCK = 512


@dataclasses.dataclass(frozen=True)
class KeyMap:
    """Mean and channel scale of the keys of every (sequence, KV head)."""

    mean: Float32[Tensor, "batch kv_heads dim"]
    scale: Float32[Tensor, "batch kv_heads dim"]

    def select(self, rows: Tensor) -> Self:
        """The maps of other sequences of the batch."""
        return type(self)(self.mean[rows], self.scale[rows])


@dataclasses.dataclass(frozen=True)
class QueryEnergy:
    """Running sum of squared queries per (sequence, KV head, channel)."""

    squares: Float32[Tensor, "batch kv_heads dim"]

    @classmethod
    def observe(
        cls,
        query: Float[Tensor, "batch heads queries dim"],
        valid: Bool[Tensor, "batch queries"] | None,
        kv_heads: int,
    ) -> Self:
        """Sum the squares of the queries of each group, leaving padding out."""
        batch, _, tokens, dim = query.shape
        squares = query.new_zeros(batch, kv_heads, dim, dtype=torch.float32)
        for block in _blocks(tokens):
            energy = query[:, :, block].float().square()
            if valid is not None:
                energy = energy.where(valid[:, None, block, None], 0.0)
            squares += energy.sum(2).view(batch, kv_heads, -1, dim).sum(2)
        return cls(squares)

    def __add__(self, other: "QueryEnergy") -> "QueryEnergy":
        return QueryEnergy(self.squares + other.squares)


def estimate_key_map(
    keys: Float[Tensor, "batch kv_heads tokens dim"],
    valid: Bool[Tensor, "batch tokens"],
    queries: QueryEnergy | None,
    *,
    center: bool,
    equalize: bool,
) -> KeyMap:
    """Fit mean and scale to the first tokens of every sequence.

    Args:
        keys: Keys seen so far.
        valid: Tokens to count: neither padding, nor attention sinks, nor repetitions.
        queries: Energy of the queries seen so far; None where the host hides them.
        center: Whether to subtract the mean; zero otherwise.
        equalize: Whether to scale; one otherwise.

    Returns:
        A map per (sequence, head). A sequence with fewer than `MIN_TOKENS` valid tokens is centred
        only; one with none yet gets the average of the batch, as offsets and outlier channels
        belong to the model. The identity if there is nothing to go by.
    """
    count = valid.sum(1)[:, None, None]
    zero = keys.new_zeros(*keys.shape[:2], keys.shape[3], dtype=torch.float32)
    mean = _sum(keys, valid, lambda block: block) / count.clamp(min=1) if center else zero
    log_scale = zero
    if equalize:
        energy = channel_energy(keys, valid, mean)
        scale = equalizing_scale(energy, None if queries is None else queries.squares)
        log_scale = scale.log().where(count >= MIN_TOKENS, 0.0)
    begun = count > 0
    return KeyMap(_or_average(mean, begun), _or_average(log_scale, begun).exp())


def _or_average(
    x: Float32[Tensor, "batch kv_heads dim"], own: Bool[Tensor, "batch 1 1"]
) -> Float32[Tensor, "batch kv_heads dim"]:
    """`x` of the sequences that have their own, the average of those for the others."""
    average = x.where(own, 0.0).sum(0) / own.sum().clamp(min=1)
    return x.where(own, average)


def channel_energy(
    keys: Float[Tensor, "batch kv_heads tokens dim"],
    valid: Bool[Tensor, "batch tokens"],
    mean: Float32[Tensor, "batch kv_heads dim"],
) -> Float32[Tensor, "batch kv_heads dim"]:
    """What stands for the energy of a channel: the root of its summed fourth powers.

    A code's error grows with its vector. Squares would leave the few massive tokens of a model long
    (one in a hundred, ten times as large as the others, only doubles a mean square), and what they
    attract of the attention would go astray. Where channels are Gaussian both say the same.
    """

    def fourth(block: Tensor) -> Tensor:
        moved = block - mean.unsqueeze(2)
        return moved.clamp(-MAX_KEY, MAX_KEY).square().square()

    return _sum(keys, valid, fourth).sqrt()


def _sum(
    keys: Float[Tensor, "batch kv_heads tokens dim"],
    valid: Bool[Tensor, "batch tokens"],
    of: Callable[[Tensor], Tensor],
) -> Float32[Tensor, "batch kv_heads dim"]:
    """Sum of `of(keys)` over valid tokens, in float32 without a float32 copy of `keys`."""
    total = keys.new_zeros(*keys.shape[:2], keys.shape[3], dtype=torch.float32)
    for block in _blocks(keys.shape[2]):
        terms = of(keys[:, :, block].float())
        total += terms.where(valid[:, None, block, None], 0.0).sum(2)
    return total


def _blocks(tokens: int) -> Iterator[slice]:
    return (slice(start, start + TOKENS_PER_BLOCK) for start in range(0, tokens, TOKENS_PER_BLOCK))


def equalizing_scale(
    key_energy: Float32[Tensor, "batch kv_heads dim"],
    query_energy: Float32[Tensor, "batch kv_heads dim"] | None,
) -> Float32[Tensor, "batch kv_heads dim"]:
    """Channel scale (σ_q/σ_k)^½ of outlier channels, one elsewhere.

    (σ_q/σ_k)^½ is the diagonal minimiser of the expected logit error; where queries are unseen,
    σ_k^-½ takes its place. Scales are relative to the head's median channel.
    """
    log_key = _log_rms(key_energy)
    log_query = torch.zeros_like(log_key) if query_energy is None else _log_rms(query_energy)
    log_scale = 0.5 * (log_query - log_key)
    log_scale = log_scale - log_scale.median(-1, keepdim=True).values
    outlier = log_scale.abs() > DEAD_ZONE
    return torch.exp(torch.where(outlier, log_scale.clamp(-MAX_LOG_SCALE, MAX_LOG_SCALE), 0.0))


def _log_rms(energy: Float32[Tensor, "... dim"]) -> Float32[Tensor, "... dim"]:
    """Log of the root mean square relative to the head's own, floored for silent channels."""
    average = energy.mean(-1, keepdim=True)
    relative = torch.where(average > 0, energy / average, torch.ones_like(energy))
    return 0.5 * torch.log(relative.clamp(min=1e-12))
