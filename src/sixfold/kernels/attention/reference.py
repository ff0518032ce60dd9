"""Plain PyTorch attention over compressed pages: the ground truth for every other backend."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float16, Float32, Int, UInt8
from torch import Tensor

from sixfold.kernels.attention.dense import apply_mask
from sixfold.kernels.attention.merge import Partial
from sixfold.kernels.decode import expand_pages
from sixfold.packing import PAGE_TOKENS, Bits, Layout

TILE_VALUES = 1 << 19  # coordinates expanded at once: what bounds the memory of a decode step
QUERIES_PER_BLOCK = 512


class _Running(NamedTuple):
    """Online softmax: maximum logit, sum of exponentials, weighted sum of values."""

    maximum: Float32[Tensor, "batch kv_heads rows"]
    total: Float32[Tensor, "batch kv_heads rows"]
    out: Float32[Tensor, "batch kv_heads rows value_dim"]


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
    """See `sixfold.kernels.attention.page_attention`."""
    batch, heads, n_queries, key_dim = query.shape
    kv_heads = key_pages.shape[1]
    tiles = list(_tiles(block_table.shape[1], batch * kv_heads * max(key_dim, value_dim)))
    parts = []
    for start in range(0, n_queries, QUERIES_PER_BLOCK):
        rows = slice(start, start + QUERIES_PER_BLOCK)
        grouped = query[:, :, rows].reshape(batch, kv_heads, -1, key_dim)
        state = _empty(grouped, value_dim)
        for tile in tiles:
            slots = block_table[:, tile]
            keys = _tokens(key_pages, key_scales, slots, key_centroids, key_dim, key_bits, "key")
            logits = (grouped @ keys.mT).view(batch, heads, -1, keys.shape[2])
            if logit_offset is not None:
                logits = logits + logit_offset[:, :, rows, None]
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            positions = _positions(page_starts[tile], page_lengths[tile])
            hidden = positions < first_token[:, rows, None]
            logits = logits.masked_fill(hidden.unsqueeze(1), -torch.inf)
            if mask is not None:
                logits = apply_mask(logits, mask[:, :, rows], positions.unsqueeze(0))
            values = _tokens(
                value_pages, value_scales, slots, value_centroids, value_dim, value_bits, "value"
            )
            state = _update(state, logits.view(batch, kv_heads, -1, keys.shape[2]), values)
        parts.append(_finish(state, heads))
    return Partial(torch.cat([p.out for p in parts], 2), torch.cat([p.lse for p in parts], 2))


def _tiles(n_pages: int, values_per_token: int) -> Iterator[slice]:
    step = max(1, TILE_VALUES // (values_per_token * PAGE_TOKENS))
    return (slice(start, start + step) for start in range(0, n_pages, step))


def _tokens(
    pages: UInt8[Tensor, "slots kv_heads bytes"],
    scales: Float16[Tensor, "slots kv_heads page"],
    slots: Int[Tensor, "batch tile"],
    centroids: Float32[Tensor, "..."],
    dim: int,
    bits: Bits,
    layout: Layout,
) -> Float32[Tensor, "batch kv_heads tokens dim"]:
    expanded = expand_pages(
        pages[slots], scales[slots], centroids, dim=dim, bits=bits, layout=layout
    )
    return expanded.transpose(1, 2).flatten(2, 3)


def _positions(
    starts: Int[Tensor, " tile"], lengths: Int[Tensor, " tile"]
) -> Int[Tensor, " tokens"]:
    """Positions of a tile's tokens; -1 for the unused rest of a page."""
    offsets = torch.arange(PAGE_TOKENS, device=starts.device)
    positions = starts[:, None] + offsets
    return positions.masked_fill(offsets >= lengths[:, None], -1).flatten()


def _empty(grouped: Float32[Tensor, "batch kv_heads rows key_dim"], value_dim: int) -> _Running:
    shape = grouped.shape[:-1]
    return _Running(
        grouped.new_full(shape, -torch.inf),
        grouped.new_zeros(shape),
        grouped.new_zeros(*shape, value_dim),
    )


def _update(
    state: _Running,
    logits: Float32[Tensor, "batch kv_heads rows tokens"],
    values: Float32[Tensor, "batch kv_heads tokens value_dim"],
) -> _Running:
    maximum = torch.maximum(state.maximum, logits.amax(-1))
    # Rows that have seen nothing yet keep maximum -inf; 0 stands in so that exp gives 0, not NaN.
    anchor = maximum.masked_fill(maximum == -torch.inf, 0.0)
    decay = torch.exp(state.maximum - anchor)
    weights = torch.exp(logits - anchor.unsqueeze(-1))
    return _Running(
        maximum,
        state.total * decay + weights.sum(-1),
        state.out * decay.unsqueeze(-1) + weights @ values,
    )


def _finish(state: _Running, heads: int) -> Partial:
    batch, value_dim = state.out.shape[0], state.out.shape[-1]
    out = state.out / state.total.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
    lse = state.maximum + torch.log(state.total)
    lse = lse.masked_fill(state.total == 0, -torch.inf)
    return Partial(out.view(batch, heads, -1, value_dim), lse.view(batch, heads, -1))
