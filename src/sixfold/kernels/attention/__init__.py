"""Attention over compressed pages, over dense tokens, and the exact merge of the two."""

from jaxtyping import Bool, Float, Float16, Float32, Int, UInt8
from torch import Tensor

from sixfold.kernels._border import checked_softcap, plain
from sixfold.kernels._dispatch import implementation
from sixfold.kernels._signature import operation
from sixfold.kernels.attention.dense import dense_attention, exact_attention, with_sinks
from sixfold.kernels.attention.merge import Partial, merge_partials, null_partial
from sixfold.packing import Bits

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
    key_pages: UInt8[Tensor, "slots kv_heads key_bytes"],
    key_scales: Float16[Tensor, "slots kv_heads page"],
    value_pages: UInt8[Tensor, "slots kv_heads value_bytes"],
    value_scales: Float16[Tensor, "slots kv_heads page"],
    block_table: Int[Tensor, "batch pages"],
    page_starts: Int[Tensor, " pages"],
    page_lengths: Int[Tensor, " pages"],
    first_token: Int[Tensor, "batch queries"],
    key_centroids: Float32[Tensor, "..."],
    value_centroids: Float32[Tensor, "..."],
    *,
    key_bits: Bits,
    value_bits: Bits,
    value_dim: int,
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
        query: Rotated, scaled queries; `heads` is a multiple of `kv_heads` (GQA: consecutive
            query heads share a key head).
        key_pages: Page pool in the key layout (docs/format.md).
        key_scales: Scale of every key, as coded by `packing.encode_scale`.
        value_pages: Page pool in the value layout.
        value_scales: Scale of every value.
        block_table: Slot in the pools of every sequence's pages, in order.
        page_starts: Position of each page's first token: a column of `mask`.
        page_lengths: Valid tokens of each page, 0 to 64.
        first_token: Tokens at earlier positions are ignored (padding, sinks kept elsewhere,
            tokens that left a sliding window).
        key_centroids: Codebook of the keys, [2^bits] or [2^(2·bits), 2] (pairs).
        value_centroids: Codebook of the values.
        key_bits: Bits a key coordinate.
        value_bits: Bits a value coordinate.
        value_dim: Dimension of the values.
        logit_offset: q·μ of centred keys (docs/key_map.md), already scaled.
        mask: True, or 0 and -inf added, where a token is attended; columns are positions.
        softcap: Logits become ``softcap·tanh(logit/softcap)`` (Gemma 2), after the offset.

    Raises:
        SixfoldError: `softcap` is not positive, or tensors do not fit each other.

    Returns:
        The output in the *rotated* value domain, float32 [batch heads queries value_dim], and its
        log-sum-exp [batch heads queries]; zero and -inf where no token is attended.
    """
    part: Partial = implementation("attention", query.device).page_attention(
        plain(query),
        key_pages,
        key_scales,
        value_pages,
        value_scales,
        block_table,
        page_starts,
        page_lengths,
        first_token,
        key_centroids,
        value_centroids,
        key_bits=key_bits,
        value_bits=value_bits,
        value_dim=value_dim,
        logit_offset=plain(logit_offset),
        mask=plain(mask),
        softcap=checked_softcap(softcap),
    )
    return part
