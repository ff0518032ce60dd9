"""Full-precision attention with a log-sum-exp, for sinks, recent tokens and short histories."""

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from sixfold.kernels._operation import (
    checked_scaling,
    checked_softcap,
    checked_window,
    operation,
    plain,
    plain_dense,
)
from sixfold.kernels._tables import check_columns
from sixfold.kernels.attention.merge import Partial, merge_partials, null_partial

LOGITS_PER_BLOCK = 1 << 22  # 16 MiB of float32: bounds the memory of a long prefill


@operation
def dense_attention(
    query: Float[Tensor, "batch heads queries key_dim"],
    keys: Float[Tensor, "batch kv_heads tokens key_dim"],
    values: Float[Tensor, "batch kv_heads tokens value_dim"],
    positions: Int[Tensor, "#batch tokens"],
    query_positions: Int[Tensor, "#batch queries"],
    *,
    scaling: float,
    mask: Bool[Tensor, "#batch #heads queries kv"]
    | Float[Tensor, "#batch #heads queries kv"]
    | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Partial:
    """Softmax attention in float32, a block of queries at a time.

    Args:
        query: Queries as the model made them.
        keys: Keys; `heads` is a multiple of `kv_heads`.
        values: Values.
        positions: Position of every token, a column of `mask`; negative hides a token.
        query_positions: Position of every query.
        scaling: Factor of the logits.
        mask: Which positions are attended. Without one attention is causal.
        sliding_window: Without a mask, only the last so many positions are attended.
        softcap: Logits become ``softcap·tanh(logit/softcap)``.

    Returns:
        Output and log-sum-exp, float32; zero and -inf where no token is attended.
    """
    softcap, scaling = checked_softcap(softcap), checked_scaling(scaling)
    sliding_window = checked_window(sliding_window)
    # Nothing else looks whether they have memory, and products of what has none crash.
    query, keys, values = (
        plain_dense("query", query),
        plain_dense("keys", keys),
        plain_dense("values", values),
    )
    batch, heads, n_queries, _ = query.shape
    block = max(1, LOGITS_PER_BLOCK // max(1, batch * heads * keys.shape[2]))
    keys, values = keys.float(), values.float()
    parts = []
    for start in range(0, n_queries, block):
        rows = slice(start, min(start + block, n_queries))
        logits = _grouped(query[:, :, rows].float() * scaling, keys.shape[1]) @ keys.mT
        logits = logits.view(batch, heads, rows.stop - start, keys.shape[2])
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if mask is None:
            hide = _hidden(positions, query_positions[:, rows], sliding_window)
            logits = logits.masked_fill_(hide.unsqueeze(1), -torch.inf)
        else:
            logits = apply_mask(logits, mask[:, :, rows], positions)
        parts.append(_weighted(logits, values))
    return Partial(torch.cat([p.out for p in parts], 2), torch.cat([p.lse for p in parts], 2))


@operation
def exact_attention(
    query: Float[Tensor, "batch heads queries key_dim"],
    keys: Float[Tensor, "batch kv_heads tokens key_dim"],
    values: Float[Tensor, "batch kv_heads tokens value_dim"],
    *,
    scaling: float,
    mask: Bool[Tensor, "#batch #heads queries kv"]
    | Float[Tensor, "#batch #heads queries kv"]
    | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sink_logits: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Uncompressed attention of the last queries over all tokens, in the dtype of `query`.

    PyTorch's fused kernel where it can express the request, float32 blocks otherwise
    (soft-capping, sink logits, windows or a shorter query without a mask).

    Args:
        query: The queries; they belong to the last tokens.
        keys: All keys.
        values: All values.
        scaling: Factor of the logits.
        mask: Which tokens are attended; causal without.
        sliding_window: Without a mask, only the last so many positions are attended.
        softcap: See `dense_attention`.
        sink_logits: A logit a head that takes part in the softmax and has no value (GPT-OSS).
    """
    softcap, scaling = checked_softcap(softcap), checked_scaling(scaling)
    sliding_window = checked_window(sliding_window)
    query, keys, values = plain(query), plain(keys), plain(values)
    n_queries, n_tokens = query.shape[2], keys.shape[2]
    cut = mask is None and sliding_window is not None and n_tokens > sliding_window
    aligned = mask is not None or n_queries in (1, n_tokens)
    if softcap is None and sink_logits is None and aligned and not cut:
        return torch.nn.functional.scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None and n_queries > 1,
            scale=scaling,
            enable_gqa=query.shape[1] != keys.shape[1],
        )
    positions = torch.arange(n_tokens, device=query.device)
    part = dense_attention(
        query,
        keys,
        values,
        positions.unsqueeze(0),
        positions[n_tokens - n_queries :].unsqueeze(0),
        scaling=scaling,
        mask=mask,
        sliding_window=sliding_window,
        softcap=softcap,
    )
    return with_sinks(part, sink_logits).out.to(query.dtype)


def with_sinks(part: Partial, sink_logits: Float[Tensor, " heads"] | None) -> Partial:
    """Let a per-head logit without a value take its share of the softmax."""
    if sink_logits is None:
        return part
    return merge_partials([part, null_partial(part, sink_logits.float()[None, :, None])])


def apply_mask(
    logits: Float[Tensor, "batch heads queries tokens"],
    mask: Bool[Tensor, "#batch #heads queries kv"] | Float[Tensor, "#batch #heads queries kv"],
    positions: Int[Tensor, "#batch tokens"],
) -> Float[Tensor, "batch heads queries tokens"]:
    """Add or apply the columns of `mask` that belong to `positions`; negative ones are hidden."""
    check_columns(mask, positions)
    batch = max(mask.shape[0], positions.shape[0])
    columns = positions.clamp(min=0)[:, None, None].expand(batch, *mask.shape[1:3], -1)
    chosen = mask.expand(batch, -1, -1, -1).gather(-1, columns)
    logits = logits.masked_fill((positions < 0)[:, None, None], -torch.inf)
    if chosen.dtype == torch.bool:
        return logits.masked_fill(~chosen, -torch.inf)
    # Hosts write "never" as the lowest finite number of a narrow dtype: make it -inf again.
    return (logits + chosen).masked_fill(chosen <= torch.finfo(chosen.dtype).min / 2, -torch.inf)


def softmax_partial(
    logits: Float[Tensor, "batch heads queries tokens"],
) -> tuple[Float[Tensor, "batch heads queries tokens"], Float[Tensor, "batch heads queries"]]:
    """Probabilities and log-sum-exp; a row of -inf gives zeros instead of NaN."""
    lse = logits.logsumexp(-1)
    return torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)), lse


def _weighted(
    logits: Float[Tensor, "batch heads queries tokens"],
    values: Float[Tensor, "batch kv_heads tokens value_dim"],
) -> Partial:
    probabilities, lse = softmax_partial(logits)
    # What no query sees may hold anything: 0 times NaN would be NaN.
    unseen = _grouped(logits == -torch.inf, values.shape[1]).all(2).unsqueeze(-1)
    out = _grouped(probabilities, values.shape[1]) @ values.masked_fill(unseen, 0.0)
    return Partial(out.view(*lse.shape, values.shape[-1]), lse)


def _grouped(
    x: Shaped[Tensor, "batch heads queries last"], kv_heads: int
) -> Shaped[Tensor, "batch kv_heads rows last"]:
    return torch.unflatten(x, 1, (kv_heads, -1)).flatten(2, 3)


def _hidden(
    positions: Int[Tensor, "#batch tokens"],
    query_positions: Int[Tensor, "#batch queries"],
    sliding_window: int | None,
) -> Bool[Tensor, "#batch queries tokens"]:
    tokens, queries = positions[:, None, :], query_positions[:, :, None]
    hidden = (tokens < 0) | (tokens > queries)
    return hidden if sliding_window is None else hidden | (tokens <= queries - sliding_window)
