"""Centring and equalization of keys: an exact affine map, estimated online (docs/key_map.md).

A key is stored as ``k' = (k - mean)·scale``, a query asks with ``q' = q/scale``, so that
``q·k = q'·k' + q·mean``: nothing is approximated here, only made easier to quantize.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Self

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from sixfold.kernels.types import KeyMap

# Channels whose scale lies within a factor of sqrt(2) of their head's median stay as they are: what
# repairs outlier channels must cost nothing where there are none (measured in docs/key_map.md).
DEAD_ZONE = math.log(2) / 2
# A channel that has been silent need not stay so: RoPE turns the slowest ones within thousands of
# tokens. What enlarges it is bounded where its spread is only what a beginning showed of it.
MAX_LOG_SCALE = 1.15
MIN_LOG_SCALE = -5.0
MIN_TOKENS = 16  # fewer say too little about a channel's spread
# Of the tokens: as many in runs of one token are left out, and fewer than that outside of runs say
# too little about a channel's spread.
MANY = 1 / 8
# Of the squared distance of two keys: above what bfloat16 rounds off, far below how text varies.
REPEAT_TOLERANCE = 0.05
# The same where each channel counts alike, times the root of how many there are: their sum varies
# the less for it.
RELATIVE_TOLERANCE = 1.6
# Far beyond what float16 scales hold; its fourth power, summed, stays finite in float32.
MAX_KEY = 2.0**24
# What is longer is cut where it is stored; sums of such keys would not be finite.
LONGEST = 2.0**97
TOKENS_PER_BLOCK = 512


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
        """Sum the squares of each group's queries that are valid, and finite as squares."""
        batch, _, tokens, dim = query.shape

        def total(choose: bool) -> Tensor:
            squares = query.new_zeros(batch, kv_heads, dim, dtype=torch.float32)
            for block in _blocks(tokens):
                energy = query[:, :, block].float().square()
                if choose:
                    counted = energy.sum(3, keepdim=True).isfinite()
                    if valid is not None:
                        counted = counted & valid[:, None, block, None]
                    energy = energy.where(counted, 0.0)
                squares += energy.sum(2).view(batch, kv_heads, -1, dim).sum(2)
            return squares

        # Mostly all count, which their sum shows; on other devices to ask would be to wait.
        if valid is None and query.device.type == "cpu":
            squares = total(choose=False)
            if squares.sum(2).isfinite().all():
                return cls(squares)
        return cls(total(choose=True))

    def __add__(self, other: "QueryEnergy") -> "QueryEnergy":
        return QueryEnergy(self.squares + other.squares)


def estimate_key_map(
    keys: Float[Tensor, "batch kv_heads tokens dim"],
    valid: Bool[Tensor, "batch tokens"],
    queries: QueryEnergy | None,
    *,
    center: bool,
    equalize: bool,
    energy: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    equalizing: Callable[[Tensor, Tensor | None], Tensor] | None = None,
) -> KeyMap:
    """Fit mean and scale to the first tokens of every sequence.

    One vector added to all keys of a head moves the mean by as much and changes nothing else,
    however long it is.

    Args:
        keys: Keys seen so far. Those that are not finite count for their own head only: not at all.
        valid: Tokens to count: neither hidden nor attention sinks. Those in runs of one token
            (`repeats`) are left out where they are many, and enough others are there.
        queries: Energy of the queries seen so far; None where the host hides them.
        center: Whether to subtract the mean; zero otherwise.
        equalize: Whether to scale; one otherwise.
        energy: What stands for the energy of a channel; `channel_energy` by default.
        equalizing: Scales of energies; `equalizing_scale` by default.

    Returns:
        A map per (sequence, head). With fewer than `MIN_TOKENS` tokens, or little but runs of one
        token, it is centred only; with no token yet it is the average of the batch, as offsets and
        outlier channels belong to the model. The identity if no sequence of the batch has any.
    """
    counted = valid[:, None] & _finite(keys)
    fresh = _without_runs(keys, counted)
    total = counted.sum(2, keepdim=True)
    enough = fresh.sum(2, keepdim=True) >= (total * MANY).clamp(min=MIN_TOKENS)
    counted = torch.where(enough, fresh, counted)
    zero = keys.new_zeros(*keys.shape[:2], keys.shape[3], dtype=torch.float32)
    mean = _mean(keys, counted) if center else zero
    log_scale = zero
    if equalize:
        spread = (energy or channel_energy)(keys, counted, mean)
        asked = None if queries is None else queries.squares
        scale = (equalizing or equalizing_scale)(spread, asked)
        log_scale = scale.log().where(enough, 0.0)
    begun = counted.any(2, keepdim=True)
    return KeyMap(_or_average(mean, begun), _or_average(log_scale, begun).exp())


@dataclasses.dataclass(frozen=True)
class KeyMapFit:
    """How the key map of a layer is fitted, where none is given: a value, as codes are.

    Attributes:
        observe: What is remembered of queries, as `QueryEnergy.observe` does.
        estimate: A map for what has been seen, as `estimate_key_map` makes it.
    """

    observe: Callable[[Tensor, Tensor | None, int], QueryEnergy] = QueryEnergy.observe
    estimate: Callable[..., KeyMap] = estimate_key_map


DEFAULT_FIT = KeyMapFit()


def _or_average(
    x: Float32[Tensor, "batch kv_heads dim"], own: Bool[Tensor, "batch kv_heads 1"]
) -> Float32[Tensor, "batch kv_heads dim"]:
    """`x` of the heads that have their own, the average of the other sequences for the rest."""
    average = x.where(own, 0.0).sum(0) / own.sum(0).clamp(min=1)
    return x.where(own, average)


def _without_runs(
    keys: Float[Tensor, "batch kv_heads tokens dim"],
    counted: Bool[Tensor, "batch kv_heads tokens"],
) -> Bool[Tensor, "batch kv_heads tokens"]:
    """Those counted that are in no run of one token, where runs are many.

    A few change no estimate, nor does a token that looks like one by chance.
    """
    most = counted.sum(2, keepdim=True) * (1 - MANY)

    def few(runs: Tensor) -> Tensor:
        return (counted & ~runs).sum(2, keepdim=True) >= most

    # What is in a run makes steps of one length, which is soon seen, and few tokens of a text do.
    # On other devices to ask would be to wait.
    if keys.device.type == "cpu" and few(_in_runs(keys, _equal_lengths)).all():
        return counted
    runs = repeats(keys)
    return torch.where(few(runs), counted, counted & ~runs)


def repeats(
    keys: Float[Tensor, "batch kv_heads tokens dim"],
) -> Bool[Tensor, "batch kv_heads tokens"]:
    """Tokens in a run of one and the same token: they say nothing about how keys spread.

    In such a run RoPE turns every key by the same angles, so that keys of a head that are one token
    apart, or two, are all equally far apart; those of a text are not. Distances, and with them the
    answer, do not depend on what is added to all keys. A run shows from its fourth token on.
    """
    return _in_runs(keys, _equal_steps)


def leading_padding(
    keys: Float[Tensor, "batch kv_heads tokens dim"],
) -> Int64[Tensor, " batch"]:
    """Left padding of every sequence, as far as its keys show it.

    Padding is one token again and again, and `generate` gives all of it one position: its keys are
    equal, bit by bit, to those beside them. Those of a token that a text repeats are not, as RoPE
    turns them, however near to each other attention sinks may be.
    """
    same = keys.new_empty(keys.shape[0], max(keys.shape[2] - 1, 0), dtype=torch.bool)
    for block in _blocks(same.shape[1]):
        later = keys[:, :, block.start + 1 : block.stop + 1]
        same[:, block] = (later == keys[:, :, block]).all(3).all(1)
    # Of two chunks of a prompt the padding may differ.
    as_before, as_after = (torch.nn.functional.pad(same, x) for x in ((1, 0), (0, 1)))
    leading = (as_before | as_after).long().cumprod(1).sum(1)
    # A sequence may be all padding so far, but not every one of the batch.
    return leading.masked_fill((leading == keys.shape[2]).all(), 0)


def _in_runs(keys: Tensor, equal: Callable[[Tensor, int], Tensor]) -> Tensor:
    # One distance alone is as long as the one before by chance, or where massive tokens take turns
    # with others.
    run = equal(keys, 1)[:, :, 1:] & equal(keys, 2)
    return torch.nn.functional.pad(run, (keys.shape[2] - run.shape[2], 0), value=False)


def _equal_steps(
    keys: Float[Tensor, "batch kv_heads tokens dim"], lag: int
) -> Bool[Tensor, "batch kv_heads later_still"]:
    """Tokens, from `lag` + 1 on, as far from the one `lag` before as the token before was.

    A bias that RoPE turns makes long and equal steps of any text in some channels: so they have to
    be equal as well where every channel counts relative to its own steps.
    """
    total = keys.new_zeros(*keys.shape[:2], keys.shape[3], dtype=torch.float32)
    for _, squares in _squared_steps(keys, lag):
        # What is not finite counts for no channel, and equals nothing.
        finite = squares.amax(3, keepdim=True).isfinite()
        total += squares.where(finite, 0.0).sum(2)
    relative = torch.where(total > 0, 1 / total, 0.0).unsqueeze(2)
    alike = _lengths(keys, lag, relative)
    tolerance = RELATIVE_TOLERANCE * keys.shape[3] ** -0.5
    return _equal_lengths(keys, lag) & _as_before(alike, tolerance)


def _equal_lengths(
    keys: Float[Tensor, "batch kv_heads tokens dim"], lag: int
) -> Bool[Tensor, "batch kv_heads later_still"]:
    return _as_before(_lengths(keys, lag), REPEAT_TOLERANCE)


def _lengths(
    keys: Float[Tensor, "batch kv_heads tokens dim"],
    lag: int,
    weights: Float32[Tensor, "batch kv_heads 1 dim"] | None = None,
) -> Float32[Tensor, "batch kv_heads later"]:
    """Squared distances of keys from those `lag` before, weighted by channel."""
    shape = *keys.shape[:2], max(keys.shape[2] - lag, 1)
    lengths = keys.new_zeros(shape, dtype=torch.float32)
    for block, squares in _squared_steps(keys, lag):
        lengths[:, :, block] = (squares if weights is None else squares * weights).sum(3)
    return lengths


def _as_before(
    step: Float32[Tensor, "batch kv_heads later"], tolerance: float
) -> Bool[Tensor, "batch kv_heads later_still"]:
    return step.diff(dim=2).abs() <= tolerance * step[:, :, 1:]


def _squared_steps(
    keys: Float[Tensor, "batch kv_heads tokens dim"], lag: int
) -> Iterator[tuple[slice, Float32[Tensor, "batch kv_heads block dim"]]]:
    for block in _blocks(keys.shape[2] - lag):
        later = keys[:, :, block.start + lag : block.stop + lag].float()
        yield block, (later - keys[:, :, block].float()).square()


def _finite(
    keys: Float[Tensor, "batch kv_heads tokens dim"],
) -> Bool[Tensor, "batch kv_heads tokens"]:
    # The largest of a vector is finite where all are.
    finite = keys.new_empty(keys.shape[:3], dtype=torch.bool)
    for block in _blocks(keys.shape[2]):
        largest = keys[:, :, block].abs().amax(3)
        finite[:, :, block] = largest.isfinite() & (largest <= LONGEST)
    return finite


def _mean(
    keys: Float[Tensor, "batch kv_heads tokens dim"],
    counted: Bool[Tensor, "batch kv_heads tokens"],
) -> Float32[Tensor, "batch kv_heads dim"]:
    """Mean of the counted keys, summed as differences from the first: exact beside any offset."""
    first = counted.int().argmax(2)[:, :, None, None].expand(-1, -1, 1, keys.shape[3])
    origin = keys.gather(2, first).float()
    total = _sum(keys, counted, lambda block: block - origin)
    return origin.squeeze(2) + total / counted.sum(2, keepdim=True).clamp(min=1)


def channel_energy(
    keys: Float[Tensor, "batch kv_heads tokens dim"],
    counted: Bool[Tensor, "batch kv_heads tokens"],
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

    return _sum(keys, counted, fourth).sqrt()


def _sum(
    keys: Float[Tensor, "batch kv_heads tokens dim"],
    counted: Bool[Tensor, "batch kv_heads tokens"],
    of: Callable[[Tensor], Tensor],
) -> Float32[Tensor, "batch kv_heads dim"]:
    """Sum of `of(keys)` over counted tokens, in float32 without a float32 copy of `keys`."""
    total = keys.new_zeros(*keys.shape[:2], keys.shape[3], dtype=torch.float32)
    for block in _blocks(keys.shape[2]):
        terms = of(keys[:, :, block].float())
        total += terms.where(counted[:, :, block, None], 0.0).sum(2)
    return total


def _blocks(tokens: int) -> Iterator[slice]:
    return (
        slice(start, min(start + TOKENS_PER_BLOCK, tokens))
        for start in range(0, tokens, TOKENS_PER_BLOCK)
    )


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
    return torch.exp(torch.where(outlier, log_scale.clamp(MIN_LOG_SCALE, MAX_LOG_SCALE), 0.0))


def _log_rms(energy: Float32[Tensor, "... dim"]) -> Float32[Tensor, "... dim"]:
    """Log of the root mean square relative to the head's own, floored for silent channels."""
    average = energy.mean(-1, keepdim=True)
    relative = torch.where(average > 0, energy / average, torch.ones_like(energy))
    return 0.5 * torch.log(relative.clamp(min=1e-12))
