"""What stands in for queries that a cache cannot see: ``python -m benchmarks.key_map_unseen``.

A cache that hands out dequantized tensors fits its key maps to keys alone. By what it takes queries
to be, beside maps that are fitted to queries as well: mean KL to the uncompressed model in nats,
windows and sinks as shipped, and the squared error of a logit that is expected of codes (see
docs/key_map.md). ``--model`` measures checkpoints instead of the embedded model.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.key_map_chunks import parser, run
from benchmarks.with_layers import with_layers
from sixfold.cache.affine import KeyMapFit, equalizing_scale, estimate_key_map
from sixfold.cache.code import page_code
from sixfold.eval.caches import MakeCache, compressed, dequantizing
from sixfold.eval.perplexity import compare_caches, fill

BITS = (4, 3, 2)

Scale: TypeAlias = Callable[[Tensor, Tensor | None], Tensor]
"""Scales [batch, kv_heads, dim] for the energies of keys and of queries, if these are seen."""


def none(keys: Tensor, queries: Tensor | None) -> Tensor:
    """No scales."""
    return torch.ones_like(keys)


def even(keys: Tensor, queries: Tensor | None) -> Tensor:
    """Scales for queries that are as loud in every channel, σ_k^-½: what is shipped."""
    return equalizing_scale(keys, None)


def opposed(keys: Tensor, queries: Tensor | None) -> Tensor:
    """Scales for queries that are louder where keys are silent, and no softer where they are loud.

    Of energies relative to the median channel's.
    """
    relative = keys / keys.median(-1, keepdim=True).values.clamp(min=1e-20)
    return equalizing_scale(keys, 1 / relative.clamp(1e-6, 1))


UNSEEN: dict[str, Scale] = {
    "not equalized": none,
    "as loud in all: shipped": even,
    "louder where keys are silent": opposed,
}
SEEN = "seen"


def with_scale(make_cache: MakeCache, scale: Scale) -> MakeCache:
    """The same caches, which equalize by `scale`."""
    fit = KeyMapFit(estimate=partial(estimate_key_map, equalizing=scale))
    return with_layers(make_cache, lambda: (page_code, fit))


def logit_errors(model: PreTrainedModel, text: Tensor) -> dict[str, float]:
    """Expected squared logit error by way, where that of queries that are seen is one.

    Args:
        model: A causal language model.
        text: What keys and queries are taken of, [tokens].

    Returns:
        Geometric means over the heads of all layers.
    """
    logs: dict[str, list[Tensor]] = {name: [] for name in UNSEEN}

    def compare(keys: Tensor, queries: Tensor | None) -> Tensor:
        assert queries is not None
        scale = equalizing_scale(keys, queries)
        least = _error(keys, queries, scale)
        for name, choose in UNSEEN.items():
            logs[name].append((_error(keys, queries, choose(keys, None)) / least).log())
        return scale

    fill(model, text, with_scale(compressed(BITS[0]), compare)(model))
    means = {name: float(torch.cat(found).mean().exp()) for name, found in logs.items()}
    return means | {SEEN: 1.0}


def _error(keys: Tensor, queries: Tensor, scale: Tensor) -> Tensor:
    squares = scale.square()
    return (queries / squares).sum(-1) * (keys * squares).sum(-1)


def study(model: PreTrainedModel, windows: Tensor) -> list[dict[str, Any]]:
    """A row for each way."""
    prefill = 2 * windows.shape[1] // 3
    ways: dict[str, Callable[[int], MakeCache]] = {
        name: lambda bits, scale=scale: with_scale(dequantizing(bits), scale)  # type: ignore[misc]
        for name, scale in UNSEEN.items()
    }
    ways[SEEN] = compressed
    caches = {f"{name} {bits}": make(bits) for name, make in ways.items() for bits in BITS}
    found = compare_caches(model, windows, caches, prefill=prefill, chunk=64)
    errors = logit_errors(model, windows[0, :prefill])
    kl = {name: {bits: found[f"{name} {bits}"].kl for bits in BITS} for name in ways}
    return [
        {
            "queries": name,
            "logit_error": errors[name],
            "kl": {f"{bits}": kl[name][bits].mean for bits in BITS},
            "standard_error": {f"{bits}": kl[name][bits].standard_error for bits in BITS},
        }
        for name in ways
    ]


if __name__ == "__main__":
    run(parser(__doc__).parse_args(), study, spare=0)
