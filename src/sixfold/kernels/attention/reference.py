"""Attention in plain PyTorch: the ground truth for every other backend."""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float16, Float32, Int, UInt8
from torch import Tensor

from sixfold.kernels._tables import check_pages
from sixfold.kernels.attention.dense import apply_mask
from sixfold.kernels.attention.merge import Partial
from sixfold.kernels.attention.parts import attend_parts
from sixfold.kernels.decode import expand_pages
from sixfold.kernels.types import Coding, Mask, Pages
from sixfold.packing import PAGE_TOKENS, Layout

TILE_VALUES = 1 << 19  # coordinates expanded at once: what bounds the memory of a decode step
QUERIES_PER_BLOCK = 512


class _Running(NamedTuple):
    """Online softmax: maximum logit, sum of exponentials, weighted sum of values."""

    maximum: Float32[Tensor, "batch kv_heads rows"]
    total: Float32[Tensor, "batch kv_heads rows"]
    out: Float32[Tensor, "batch kv_heads rows value_dim"]


def page_attention(
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
    """See `sixfold.kernels.attention.parts.PageAttention`."""
    batch, heads, n_queries, _ = query.shape
    pool, kv_heads = pages.pool, pages.pool.key_codes.shape[1]
    widest = max(keys.dim, values.dim)
    tiles = list(_tiles(pages.slots.shape[1], batch * kv_heads * widest))
    check_pages(pages)
    parts = []
    for start in range(0, n_queries, QUERIES_PER_BLOCK):
        rows = slice(start, start + QUERIES_PER_BLOCK)
        grouped = query[:, :, rows].reshape(batch, kv_heads, -1, keys.dim)
        state = _empty(grouped, values.dim)
        for tile in tiles:
            positions = page_positions(pages, tile)
            where = pages.slots[:, tile], positions
            dense = _tokens(pool.key_codes, pool.key_scales, *where, keys, "key")
            logits = (grouped @ dense.mT).view(batch, heads, -1, dense.shape[2])
            if logit_offset is not None:
                logits = logits + logit_offset[:, :, rows, None]
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            hidden = positions[:, None] < first_token[:, rows, None]
            logits = logits.masked_fill(hidden.unsqueeze(1), -torch.inf)
            if mask is not None:
                logits = apply_mask(logits, mask[:, :, rows], positions)
            logits = logits.view(batch, kv_heads, -1, dense.shape[2])
            dense = _tokens(pool.value_codes, pool.value_scales, *where, values, "value")
            state = _update(state, logits, dense)
        parts.append(_finish(state, heads))
    return Partial(torch.cat([p.out for p in parts], 2), torch.cat([p.lse for p in parts], 2))


attention = partial(attend_parts, page_attention)


def _tiles(n_pages: int, values_per_token: int) -> Iterator[slice]:
    step = max(1, TILE_VALUES // (values_per_token * PAGE_TOKENS))
    return (slice(start, start + step) for start in range(0, n_pages, step))


def _tokens(
    codes: UInt8[Tensor, "slots kv_heads bytes"],
    scales: Float16[Tensor, "slots kv_heads page"],
    slots: Int[Tensor, "batch tile"],
    positions: Int[Tensor, "#batch tokens"],
    coding: Coding,
    layout: Layout,
) -> Float32[Tensor, "batch kv_heads tokens dim"]:
    """Vectors of a tile's tokens; zeros in the unused rest of a page, which may hold anything."""
    unused = (positions < 0).unflatten(1, (-1, 1, PAGE_TOKENS))
    expanded = expand_pages(codes[slots], scales[slots].masked_fill(unused, 0), coding, layout)
    return expanded.transpose(1, 2).flatten(2, 3)


def page_positions(pages: Pages, tile: slice = slice(None)) -> Int[Tensor, "#batch tokens"]:
    """Positions of the tokens of some pages, 64 a page; -1 for the unused rest of a page."""
    starts, lengths = pages.starts[:, tile, None] + pages.first, pages.lengths[:, tile, None]
    offsets = torch.arange(PAGE_TOKENS, device=starts.device)
    return torch.where(offsets < lengths, starts + offsets, -1).flatten(1)


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
    # What no row sees may hold anything: 0 times NaN would be NaN.
    values = values.masked_fill((logits == -torch.inf).all(2).unsqueeze(-1), 0.0)
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
