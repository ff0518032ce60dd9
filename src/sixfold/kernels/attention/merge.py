"""Exact merge of attention over disjoint sets of tokens, by log-sum-exp."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float32
from torch import Tensor


class Partial(NamedTuple):
    """Attention over some of the tokens: normalised output and log-sum-exp of its logits."""

    out: Float32[Tensor, "batch heads queries dim"]
    lse: Float32[Tensor, "batch heads queries"]


def null_partial(like: Partial, lse: Float32[Tensor, "..."]) -> Partial:
    """A part that takes probability mass `lse` and contributes nothing (attention-sink logits)."""
    return Partial(torch.zeros_like(like.out), lse.expand_as(like.lse))


def merge_partials(parts: Sequence[Partial]) -> Partial:
    """Combine attention over disjoint tokens into attention over their union.

    Args:
        parts: At least one part; a part that attended nothing has log-sum-exp -inf.

    Returns:
        ``out = Σ_p w_p·out_p`` with ``w = softmax(lse)`` over the parts: exact, whatever the split.
    """
    if len(parts) == 1:
        return parts[0]
    lse = torch.stack([part.lse for part in parts])
    total = lse.logsumexp(0)
    # A query that sees nothing at all (a padding row) has total = -inf; its weights must be 0.
    weights = torch.exp(lse - total.masked_fill(total == -torch.inf, 0.0))
    out = torch.zeros_like(parts[0].out)
    for part, weight in zip(parts, weights, strict=True):
        out.addcmul_(part.out, weight.unsqueeze(-1))
    return Partial(out, total)
