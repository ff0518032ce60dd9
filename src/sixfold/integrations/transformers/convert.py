"""Caches that another attention has filled, compressed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    LinearAttentionLayer,
    QuantizedLayer,
)

from sixfold.arguments import dense
from sixfold.cache import CompressedLayer
from sixfold.cache.dense import check_tokens
from sixfold.errors import ShapeError, SixfoldError
from sixfold.integrations.transformers.combined import (
    HybridTurboQuantLayer,
    IndexedTurboQuantLayer,
    held_beside,
)
from sixfold.integrations.transformers.layer import TurboQuantLayer, forked

_DENSE = (DynamicLayer, DynamicSlidingWindowLayer)
# What a layer that holds more than keys and values is made from.
_COMBINED = {
    HybridTurboQuantLayer: LinearAttentionLayer,
    IndexedTurboQuantLayer: DynamicLayer,
}


def convert_layers(
    source: Cache, layers: Sequence[Any], attention_mask: Tensor | None
) -> list[Any]:
    """Layers like the empty `layers` that hold what those of `source` do.

    Raises:
        SixfoldError: See `TurboQuantCache.from_cache`.
    """
    if not isinstance(source, Cache) or isinstance(source, EncoderDecoderCache):
        raise SixfoldError(
            f"expected a DynamicCache of a decoder-only model, got {type(source).__name__}."
        )
    if len(source.layers) != len(layers):
        raise SixfoldError(
            f"expected a cache of this model's {len(layers)} layers, got one of "
            f"{len(source.layers)}: make it with DynamicCache(config=model.config) and prefill it."
        )
    for layer in source.layers:
        _check_held(layer)
    held = [x.get_seq_length() for x in source.layers if isinstance(x, DynamicLayer)]
    if len({n for n in held if n}) > 1:
        raise SixfoldError(
            f"expected layers that have seen the same tokens, got {held}: a forward pass was "
            "interrupted, so prefill again."
        )
    return [_converted(*pair, attention_mask) for pair in zip(source.layers, layers, strict=True)]


def _check_held(layer: Any) -> None:
    """Refuse what no attention leaves in a layer: a cache is open to whoever has it."""
    if not isinstance(layer, DynamicLayer) or not layer.is_initialized:
        return
    if not isinstance(layer.keys, Tensor) or layer.keys.numel():
        check_tokens(layer.keys, layer.values)


def _converted(layer: Any, empty: Any, mask: Tensor | None) -> Any:
    if isinstance(empty, TurboQuantLayer):
        kind = _COMBINED.get(type(empty))
        known = type(layer) in _DENSE if kind is None else isinstance(layer, kind)
        if not known or isinstance(layer, QuantizedLayer):
            raise SixfoldError(
                f"expected layers of a DynamicCache, got a {type(layer).__name__}, whose tokens "
                "cannot be read: fill a DynamicCache(config=model.config) instead."
            )
        if layer.get_seq_length():
            empty.adopt(_compressed(layer, empty, mask))
        if kind is not None:
            empty.adopt_extra({n: x.detach().clone() for n, x in held_beside(layer).items()})
        return empty
    if type(layer) is type(empty):
        return forked(layer)
    raise SixfoldError(
        f"expected a {type(empty).__name__} where the source has a {type(layer).__name__}: make "
        "it with DynamicCache(config=model.config)."
    )


def _compressed(layer: Any, empty: TurboQuantLayer, mask: Tensor | None) -> CompressedLayer:
    keys, values = layer.keys, layer.values
    store = CompressedLayer(keys, values, empty.policy, empty.sliding_window, empty.key_map)
    store.append(keys.detach(), values.detach())
    # What a sliding layer has let go of was seen all the same.
    store.evicted = layer.get_seq_length() - keys.shape[2]
    if mask is not None:
        store.padding = _padding(mask, keys.shape[0], store.length).to(keys.device)
    store.compress()
    store.detached = keys.requires_grad or values.requires_grad
    return store


def _padding(mask: Tensor, batch: int, tokens: int) -> Tensor:
    """Left padding of every sequence."""
    dense("attention_mask", mask)
    if mask.shape != (batch, tokens) or mask.is_meta:
        raise ShapeError(
            f"attention_mask: expected [{batch}, {tokens}], a row for every sequence and a column "
            f"for every token of the cache, got {list(mask.shape)} on {mask.device}."
        )
    return (mask.to(torch.int64).cumsum(1) == 0).sum(1)
