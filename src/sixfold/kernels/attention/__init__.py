"""Attention over all a compressed layer holds: pages of codes, and tokens in full precision."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sixfold.kernels._dispatch import implementation
from sixfold.kernels._groups import check_heads
from sixfold.kernels._operation import (
    checked_scaling,
    checked_softcap,
    checked_window,
    operation,
    plain_dense,
)
from sixfold.kernels.attention import reference
from sixfold.kernels.attention.dense import dense_attention, exact_attention, with_sinks
from sixfold.kernels.attention.merge import Partial, merge_partials, null_partial
from sixfold.kernels.types import Coding, Past, Softmax, Tokens

__all__ = [
    "Partial",
    "attention",
    "dense_attention",
    "exact_attention",
    "merge_partials",
    "null_partial",
    "with_sinks",
]


@operation
def attention(
    query: Float[Tensor, "batch heads queries key_dim"],
    tokens: Sequence[Tokens],
    past: Past,
    keys: Coding,
    values: Coding,
    position: Int64[Tensor, " batch"],
    softmax: Softmax,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Softmax attention of consecutive queries over a layer's tokens, compressed and not.

    Sequences may differ in all that is held of them. Compressed keys k are held as
    k' = (k - mean)·scale, coded in a rotated domain: the
    query is mapped, scaled and rotated once, the values' part of the output rotated back once, and
    no key or value is decoded. All parts are merged exactly by log-sum-exp.

    Args:
        query: Queries as the model made them; `heads` is a multiple of `kv_heads` (GQA).
        tokens: Uncompressed parts, of one dtype.
        past: What is held beside them; every token in its pages comes before every query.
        keys: How the keys in pages were coded.
        values: How the values in pages were coded.
        position: Position of each sequence's first query; the others follow.
        softmax: What makes weights of logits.

    Raises:
        SixfoldError: `softcap` or `sliding_window` is not positive, or tensors do not fit each
            other.

    Returns:
        The output in the dtype of `query`; zero where no token is attended.
    """
    if 0 in query.shape[:3]:
        return query.new_zeros(*query.shape[:3], values.dim)
    kv_heads = past.key_map.mean.shape[1]
    if query.shape[1] % (kv_heads or 1):
        check_heads(query.shape[1], kv_heads)
    softmax = _checked(softmax)
    kernel = implementation("attention", query.device)
    if torch.is_grad_enabled() and _wants_gradient(query, tokens, past, softmax):
        # What others compute has no graph.
        kernel = reference
    out: Tensor = kernel.attention(query, tokens, past, keys, values, position, softmax)
    return out


def _checked(softmax: Softmax) -> Softmax:
    scaling, mask, sliding_window, softcap, sinks = softmax
    return Softmax(
        checked_scaling(scaling),
        mask if mask is None else plain_dense("mask", mask),
        checked_window(sliding_window),
        softcap if softcap is None else checked_softcap(softcap),
        sinks if sinks is None else plain_dense("sink_logits", sinks),
    )


def _wants_gradient(query: Tensor, tokens: Sequence[Tokens], past: Past, softmax: Softmax) -> bool:
    parts = [x for part in (*past.kept, *tokens) for x in part[:2]]
    given = (query, *parts, *past.key_map[:2], softmax.mask, softmax.sink_logits)
    return any([x is not None and x.requires_grad for x in given])
