"""FlashAttention's interface, as far as the backend uses it, in plain PyTorch."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    max_seqlen_q: int,
    cu_seqlens_q: Tensor,
    max_seqlen_k: int,
    cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: list[int] | None = None,
    softcap: float = 0.0,
    block_table: Tensor | None = None,
    out: Tensor | None = None,
    fa_version: int = 2,
    s_aux: Tensor | None = None,
) -> Tensor:
    """Causal to the bottom right; keys packed, or in blocks by a table."""
    assert out is not None
    assert softmax_scale is not None
    assert causal
    assert fa_version in (2, 3, 4)
    assert cu_seqlens_q.dtype is torch.int32
    assert (cu_seqlens_k is None) != (seqused_k is None), "one of them"
    assert (block_table is None) == (seqused_k is None), "blocks need lengths"
    starts = cu_seqlens_q.tolist()
    assert max_seqlen_q == max(b - a for a, b in pairwise(starts))
    longest = 0
    for i, (begin, end) in enumerate(pairwise(starts)):
        if block_table is None:
            assert cu_seqlens_k is not None
            own = slice(int(cu_seqlens_k[i]), int(cu_seqlens_k[i + 1]))
            keys, values = k[own], v[own]
        else:
            assert seqused_k is not None
            assert block_table.dtype is torch.int32
            length = int(seqused_k[i])
            # The whole table is read: entries beyond a request's must exist.
            keys, values = (x[block_table[i].long()].flatten(0, 1)[:length] for x in (k, v))
        longest = max(longest, len(keys))
        out[begin:end] = _attend(
            q[begin:end], keys, values, softmax_scale, window_size, softcap, s_aux
        )
    assert max_seqlen_k == longest
    return out


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    window: list[int] | None,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    groups = query.shape[1] // keys.shape[1]
    keys, values = (x.float().repeat_interleave(groups, 1) for x in (keys, values))
    logits = torch.einsum("qhd,khd->hqk", query.float(), keys) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    own = torch.arange(len(query))[:, None] + len(keys) - len(query)
    columns = torch.arange(len(keys))
    left, right = (-1, -1) if window is None else window
    hidden = columns > own
    if left >= 0:
        hidden |= columns < own - left
    assert right in (-1, 0)
    logits = logits.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks.float()[:, None, None].expand(-1, len(query), 1)], 2)
    weights: Any = logits.softmax(2)[:, :, : len(keys)]
    return torch.einsum("hqk,khd->qhd", weights, values).to(query.dtype)
