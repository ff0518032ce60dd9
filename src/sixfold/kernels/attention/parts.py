"""Attention over a compressed layer part by part: the parts' own, and the exact merge of them."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float32, Int, Int64
from torch import Tensor

from sixfold.kernels._narrow import narrow
from sixfold.kernels._tables import check_layer, check_map, check_positions, check_table
from sixfold.kernels.attention.dense import dense_attention, with_sinks
from sixfold.kernels.attention.merge import Partial, merge_partials
from sixfold.kernels.rotate import rotate
from sixfold.kernels.types import Coding, KeyMap, Mask, Pages, Past, Softmax, Tokens


@runtime_checkable
class PageAttention(Protocol):
    """Attention on pages alone: what backends differ in."""

    def __call__(
        self,
        query: Float32[Tensor, "batch heads queries key_dim"],
        pages: Pages,
        keys: Coding,
        values: Coding,
        first_token: Int[Tensor, "batch queries"],
        *,
        logit_offset: Float32[Tensor, "batch heads queries"] | None = None,
        mask: Mask | None = None,
        softcap: float | None = None,
    ) -> Partial:
        """Attend with rotated queries on compressed keys and values, in the rotated domain.

        The logit of query i and token j is ``⟨query_i, s_j·c[codes_j]⟩ + logit_offset_i``; softmax
        scaling, equalization and the key rotation are already in `query`. Every token of a page
        comes before every query, so causality needs no mask.

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

        Returns:
            The output in the *rotated* value domain, float32 [batch heads queries value_dim], and
            its log-sum-exp [batch heads queries]; zero and -inf where no token is attended.
        """


def attend_parts(
    page_attention: PageAttention,
    query: Float[Tensor, "batch heads queries key_dim"],
    tokens: Sequence[Tokens],
    past: Past,
    keys: Coding,
    values: Coding,
    position: Int64[Tensor, " batch"],
    softmax: Softmax,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """See `sixfold.kernels.attention.attention`; `page_attention` takes the pages."""
    check_layer(query, tokens, past, (keys.dim, values.dim), position, softmax.sink_logits)
    check_positions("position", position)
    own = position[:, None] + torch.arange(query.shape[2], device=query.device)
    parts = [
        dense_attention(
            query,
            *visible_tokens(part),
            own,
            scaling=softmax.scaling,
            mask=softmax.mask,
            sliding_window=softmax.sliding_window,
            softcap=softmax.softcap,
        )
        for part in (*past.kept, *tokens)
    ]
    if past.pages:
        first_token = past.start[:, None].expand_as(own)
        if softmax.sliding_window is not None and softmax.mask is None:
            first_token = torch.maximum(first_token, own - softmax.sliding_window + 1)
        mapped, offset = _to_keys(query.float() * softmax.scaling, past.key_map)
        mapped = rotate(mapped, keys.turns, keys.factor)
        coded = [
            page_attention(
                mapped,
                part,
                keys,
                values,
                first_token,
                logit_offset=offset,
                mask=softmax.mask,
                softcap=softmax.softcap,
            )
            for part in past.pages
        ]
        merged = merge_partials(coded)
        out = rotate(merged.out, values.turns, values.factor, inverse=True)
        parts.append(Partial(out, merged.lse))
    return narrow(with_sinks(merge_partials(parts), softmax.sink_logits).out, query.dtype)


def visible_tokens(part: Tokens) -> tuple[Tensor, Tensor, Int64[Tensor, "batch tokens"]]:
    """Keys, values and positions; of hidden tokens, which may hold anything, 0, 0 and -1."""
    keys, values = part.keys, part.values
    for name in ("first", "start", "stop"):
        check_positions(f"tokens.{name}", getattr(part, name))
    if part.slots is not None:
        check_table("tokens.slots", part.slots, len(keys))
        keys, values = keys[part.slots], values[part.slots]
    positions = part.first[:, None] + torch.arange(keys.shape[2], device=keys.device)
    hidden = positions < part.start[:, None]
    if part.stop is not None:
        hidden = hidden | (positions >= part.stop[:, None])
    unread = hidden[:, None, :, None]
    keys, values = keys.masked_fill(unread, 0), values.masked_fill(unread, 0)
    return keys, values, positions.masked_fill(hidden, -1)


def _to_keys(query: Tensor, key_map: KeyMap) -> tuple[Tensor, Tensor]:
    """The query that meets mapped keys, and the logit offset q·mean that completes it."""
    check_map(key_map, len(query))
    mean, scale, _ = key_map.of_sequences()
    groups = query.shape[1] // mean.shape[1]
    mean = mean.repeat_interleave(groups, 1).unsqueeze(-1)
    scale = scale.repeat_interleave(groups, 1).unsqueeze(2)
    return query / scale, (query @ mean).squeeze(-1)
