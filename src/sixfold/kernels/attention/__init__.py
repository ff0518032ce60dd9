"""Attention over compressed pages, over dense tokens, and the exact merge of the two."""

import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor

from sixfold.kernels._dispatch import implementation
from sixfold.kernels._operation import checked_softcap, operation, plain
from sixfold.kernels.attention import reference
from sixfold.kernels.attention.dense import dense_attention, exact_attention, with_sinks
from sixfold.kernels.attention.merge import Partial, merge_partials, null_partial
from sixfold.kernels.types import Coding, Pages

__all__ = [
    "Partial",
    "dense_attention",
    "exact_attention",
    "merge_partials",
    "null_partial",
    "page_attention",
    "with_sinks",
]


@operation
def page_attention(
    query: Float32[Tensor, "batch heads queries key_dim"],
    pages: Pages,
    keys: Coding,
    values: Coding,
    first_token: Int[Tensor, "batch queries"],
    *,
    logit_offset: Float32[Tensor, "batch heads queries"] | None = None,
    mask: Bool[Tensor, "#batch #heads queries kv"]
    | Float[Tensor, "#batch #heads queries kv"]
    | None = None,
    softcap: float | None = None,
) -> Partial:
    """Attend with rotated queries on compressed keys and values, in the rotated domain.

    The logit of query i and token j is ``⟨query_i, s_j·c[codes_j]⟩ + logit_offset_i``; softmax
    scaling, equalization and the key rotation are already in `query`. Every token of a page comes
    before every query, so causality needs no mask.

    Args:
        query: Rotated, scaled queries; `heads` is a multiple of the KV heads (GQA: consecutive
            query heads share a key head).
        pages: Where the codes are; sequences may differ in pages and in tokens.
        keys: How the keys were coded.
        values: How the values were coded.
        first_token: Tokens at earlier positions are ignored (padding, sinks kept elsewhere,
            tokens that left a sliding window).
        logit_offset: q·μ of centred keys (docs/key_map.md), already scaled.
        mask: True, or 0 and -inf added, where a token is attended; columns are positions.
        softcap: Logits become ``softcap·tanh(logit/softcap)`` (Gemma 2), after the offset.

    Raises:
        SixfoldError: `softcap` is not positive, or tensors do not fit each other.

    Returns:
        The output in the *rotated* value domain, float32 [batch heads queries value_dim], and its
        log-sum-exp [batch heads queries]; zero and -inf where no token is attended.
    """
    kernel = implementation("attention", query.device)
    if query.requires_grad and torch.is_grad_enabled():
        # What others compute has no graph.
        kernel = reference
    part: Partial = kernel.page_attention(
        plain(query),
        pages,
        keys,
        values,
        first_token,
        logit_offset=plain(logit_offset),
        mask=plain(mask),
        softcap=checked_softcap(softcap),
    )
    return part
