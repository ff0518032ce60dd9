"""Attention over a compressed layer in plain PyTorch, part by part."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from sixfold.kernels._narrow import narrow
from sixfold.kernels.attention import (
    Partial,
    dense_attention,
    merge_partials,
    page_attention,
    with_sinks,
)
from sixfold.kernels.cached_attention.parts import Coding, Pages, Tokens
from sixfold.kernels.rotate import rotate


def cached_attention(
    query: Float[Tensor, "batch heads queries key_dim"],
    tokens: Sequence[Tokens],
    pages: Sequence[Pages],
    keys: Coding,
    values: Coding,
    *,
    mean: Float32[Tensor, "batch kv_heads key_dim"],
    channel_scale: Float32[Tensor, "batch kv_heads key_dim"],
    position: int,
    start: Int64[Tensor, " batch"],
    scaling: float,
    mask: Bool[Tensor, "#batch #heads queries kv"]
    | Float[Tensor, "#batch #heads queries kv"]
    | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sink_logits: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """See `sixfold.kernels.cached_attention.cached_attention`."""
    own = torch.arange(position, position + query.shape[2], device=query.device)
    parts = [
        dense_attention(
            query,
            part.keys,
            part.values,
            _positions(part),
            own,
            scaling=scaling,
            mask=mask,
            sliding_window=sliding_window,
            softcap=softcap,
        )
        for part in tokens
    ]
    if pages:
        first_token = start[:, None].expand(-1, len(own))
        if sliding_window is not None and mask is None:
            first_token = torch.maximum(first_token, own - sliding_window + 1)
        mapped, offset = _to_keys(query.float() * scaling, mean, channel_scale)
        mapped = rotate(mapped, keys.turns, keys.factor)
        coded = [
            _attend_pages(mapped, part, offset, first_token, keys, values, mask, softcap)
            for part in pages
        ]
        merged = merge_partials(coded)
        out = rotate(merged.out, values.turns, values.factor, inverse=True)
        parts.append(Partial(out, merged.lse))
    return narrow(with_sinks(merge_partials(parts), sink_logits).out, query.dtype)


def _positions(part: Tokens) -> Int64[Tensor, "batch tokens"]:
    """Position of every token; -1 where it is hidden."""
    found = part.first[:, None] + torch.arange(part.keys.shape[2], device=part.first.device)
    hidden = (found < part.start[:, None]) | (found >= part.stop[:, None])
    return found.masked_fill(hidden, -1)


def _to_keys(query: Tensor, mean: Tensor, channel_scale: Tensor) -> tuple[Tensor, Tensor]:
    """The query that meets mapped keys, and the logit offset q·mean that completes it."""
    groups = query.shape[1] // mean.shape[1]
    mean = mean.repeat_interleave(groups, 1).unsqueeze(-1)
    channel_scale = channel_scale.repeat_interleave(groups, 1).unsqueeze(2)
    return query / channel_scale, (query @ mean).squeeze(-1)


def _attend_pages(
    query: Tensor,
    part: Pages,
    offset: Tensor,
    first_token: Tensor,
    keys: Coding,
    values: Coding,
    mask: Tensor | None,
    softcap: float | None,
) -> Partial:
    return page_attention(
        query,
        part.key_pages,
        part.key_scales,
        part.value_pages,
        part.value_scales,
        part.block_table,
        part.starts + part.first,
        part.lengths,
        first_token,
        keys.centroids,
        values.centroids,
        key_bits=keys.bits,
        value_bits=values.bits,
        value_dim=values.dim,
        logit_offset=offset,
        mask=mask,
        softcap=softcap,
    )
