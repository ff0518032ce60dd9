"""Attention over all a compressed layer holds: uncompressed tokens and pages of codes."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from sixfold.kernels._dispatch import implementation
from sixfold.kernels._groups import check_heads
from sixfold.kernels._operation import (
    checked_scaling,
    checked_softcap,
    operation,
    plain,
    plain_tokens,
)
from sixfold.kernels.types import Coding, Past, Softmax, Tokens

__all__ = ["cached_attention"]


@operation
def cached_attention(
    query: Float[Tensor, "batch heads queries key_dim"],
    tokens: Sequence[Tokens],
    past: Past,
    keys: Coding,
    values: Coding,
    *,
    position: Int64[Tensor, " batch"],
    scaling: float,
    mask: Bool[Tensor, "#batch #heads queries kv"]
    | Float[Tensor, "#batch #heads queries kv"]
    | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sink_logits: Float[Tensor, " heads"] | None = None,
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
        scaling: Factor of the logits.
        mask: True, or 0 and -inf added, where a token is attended; columns are positions. Without
            one attention is causal.
        sliding_window: Without a mask, only the last so many positions are attended.
        softcap: Logits become ``softcap·tanh(logit/softcap)`` (Gemma 2).
        sink_logits: A logit a head that takes part in the softmax and has no value (GPT-OSS).

    Raises:
        SixfoldError: `softcap` is not positive, or tensors do not fit each other.

    Returns:
        The output in the dtype of `query`; zero where no token is attended.
    """
    if 0 in query.shape[:3]:
        return query.new_zeros(*query.shape[:3], values.dim)
    kv_heads = past.key_map.mean.shape[1]
    if query.shape[1] % (kv_heads or 1):
        check_heads(query.shape[1], kv_heads)
    if not torch.compiler.is_compiling():
        query, tokens = plain(query), plain_tokens(tokens)
    out: Tensor = implementation("cached_attention", query.device).cached_attention(
        query,
        tokens,
        past,
        keys,
        values,
        position,
        Softmax(
            checked_scaling(scaling),
            mask if mask is None else plain(mask),
            sliding_window,
            softcap if softcap is None else checked_softcap(softcap),
            sink_logits if sink_logits is None else plain(sink_logits),
        ),
    )
    return out
