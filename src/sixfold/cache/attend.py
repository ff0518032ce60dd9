"""Attention over the parts of a compressed layer: sinks and recent tokens, and pages of codes."""

import dataclasses

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from sixfold.cache.coder import Coder
from sixfold.cache.dense import DenseTokens
from sixfold.cache.pages import PagedHistory, Run
from sixfold.cache.prefix import Prefix
from sixfold.kernels.attention import Partial, dense_attention, merge_partials, page_attention

Mask = Bool[Tensor, "#batch #heads queries kv"] | Float[Tensor, "#batch #heads queries kv"]


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked of the history.

    Attributes:
        query: Queries as the model made them.
        positions: Their positions, counted from the oldest token held.
        scaling: Factor of the logits.
        mask: Attended positions; causal (and sliding) without.
        sliding_window: Tokens a query sees, itself included.
        softcap: Logits become ``softcap·tanh(logit/softcap)``.
    """

    query: Float[Tensor, "batch heads queries key_dim"]
    positions: Int64[Tensor, " queries"]
    scaling: float
    mask: Mask | None
    sliding_window: int | None
    softcap: float | None


def fit_mask(
    mask: Mask, tokens: int
) -> Bool[Tensor, "#batch #heads queries fit"] | Float[Tensor, "#batch #heads queries fit"]:
    """The columns of the last `tokens` tokens; those that `mask` does not reach are hidden."""
    missing = tokens - mask.shape[-1]
    if missing <= 0:
        return mask[..., -missing:]
    hidden = False if mask.dtype == torch.bool else -torch.inf
    return torch.nn.functional.pad(mask, (missing, 0), value=hidden)


def attend_tokens(request: Request, prefix: Prefix, window: DenseTokens, first: int) -> Partial:
    """Attend on the sinks and on the window, whose first token has position `first`."""
    recent = torch.arange(first, first + window.tokens, device=request.query.device)
    recent = torch.where(recent < prefix.end[:, None], -1, recent)
    tokens = prefix.sinks.append(window)
    return dense_attention(
        request.query,
        tokens.keys,
        tokens.values,
        torch.cat([prefix.positions(), recent], 1),
        request.positions,
        scaling=request.scaling,
        mask=request.mask,
        sliding_window=request.sliding_window,
        softcap=request.softcap,
    )


def attend_codes(
    request: Request, prefix: Prefix, history: PagedHistory, keys: Coder, values: Coder
) -> Partial:
    """Attend on every page: the query is mapped and rotated once, the output rotated back once."""
    query, offset = prefix.key_map.to_query(request.query.float() * request.scaling)
    query = keys.rotation.rotate(query)
    first = _first_token(request, prefix)
    parts, start = [], 0
    for run in history.runs:
        parts.append(_attend_run(request, run, start, query, offset, first, keys, values))
        start += run.tokens
    merged = merge_partials(parts)
    return Partial(values.rotation.rotate(merged.out, inverse=True), merged.lse)


def _attend_run(
    request: Request,
    run: Run,
    start: int,
    query: Tensor,
    offset: Tensor,
    first: Tensor,
    keys: Coder,
    values: Coder,
) -> Partial:
    return page_attention(
        query,
        *run.slab.tensors,
        run.slots,
        run.starts(start),
        run.lengths,
        first,
        keys.centroids(query.device),
        values.centroids(query.device),
        key_bits=keys.bits,
        value_bits=values.bits,
        value_dim=values.dim,
        logit_offset=offset,
        mask=request.mask,
        softcap=request.softcap,
    )


def _first_token(request: Request, prefix: Prefix) -> Int64[Tensor, "batch queries"]:
    """First position each query may read from codes: after padding and sinks, in its window."""
    first = prefix.end[:, None].expand(-1, len(request.positions))
    if request.sliding_window is None or request.mask is not None:
        return first
    return torch.maximum(first, request.positions - request.sliding_window + 1)
