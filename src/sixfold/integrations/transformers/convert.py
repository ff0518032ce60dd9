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
from sixfold.integrations.transformers.layers import CrossAttentionLayer

_DENSE = (DynamicLayer, DynamicSlidingWindowLayer)
# What a layer that holds more than keys and values is made from.
_COMBINED = {
    HybridTurboQuantLayer: LinearAttentionLayer,
    IndexedTurboQuantLayer: DynamicLayer,
}


def convert_layers(
    source: Cache,
    layers: Sequence[Any],
    shapes: Sequence[tuple[int, int, int] | None],
    attention_mask: Tensor | None,
) -> list[Any]:
    """Layers like the empty `layers` that hold what those of `source` do.

    Args:
        source: A cache that another attention has filled.
        layers: Empty layers of the same model.
        shapes: KV heads, key and value dim of each, where they are known.
        attention_mask: See `TurboQuantCache.from_cache`.

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
    for index, (layer, shape) in enumerate(zip(source.layers, shapes, strict=True)):
        _check_held(index, layer, shape)
    own = zip(source.layers, layers, strict=True)
    held = [
        layer
        for layer, empty in own
        if isinstance(layer, DynamicLayer) and not isinstance(empty, CrossAttentionLayer)
    ]
    lengths = [layer.get_seq_length() for layer in held]
    if len({n for n in lengths if n}) > 1:
        raise SixfoldError(
            f"expected layers that have seen the same tokens, got {lengths}: a forward pass was "
            "interrupted, so prefill again."
        )
    batches = [len(layer.keys) for layer in held if layer.keys is not None and layer.keys.numel()]
    if len(set(batches)) > 1:
        raise SixfoldError(f"expected layers of the same sequences, got {batches} of them.")
    return [_converted(*pair, attention_mask) for pair in zip(source.layers, layers, strict=True)]


def _check_held(index: int, layer: Any, shape: tuple[int, int, int] | None) -> None:
    """Refuse what no attention leaves in a layer: a cache is open to whoever has it."""
    if not isinstance(layer, DynamicLayer) or not layer.is_initialized:
        return
    keys: Any = layer.keys
    values: Any = layer.values
    if isinstance(keys, Tensor) and not keys.numel():
        return
    check_tokens(keys, values)
    if keys.is_meta or values.is_meta:
        raise SixfoldError(f"layer {index} holds tokens on the meta device: nothing to compress.")
    found = keys.shape[1], keys.shape[3], values.shape[3]
    if shape is not None and found != shape:
        raise ShapeError(
            f"layer {index}: expected the KV heads, key and value dim of this model, {shape}, got "
            f"{found}: another model has filled this cache."
        )


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
    if isinstance(empty, CrossAttentionLayer) and type(layer) is DynamicLayer:
        empty.__dict__.update(layer.__dict__)
        return _own(empty)
    if type(layer) is type(empty):
        return _own(forked(layer))
    raise SixfoldError(
        f"expected a {type(empty).__name__} where the source has a {type(layer).__name__}: make "
        "it with DynamicCache(config=model.config)."
    )


def _own(layer: Any) -> Any:
    """The layer, keys and values in memory of its own."""
    for name in ("keys", "values"):
        if isinstance(held := vars(layer).get(name), Tensor):
            setattr(layer, name, held.clone())
    return layer


def _compressed(layer: Any, empty: TurboQuantLayer, mask: Tensor | None) -> CompressedLayer:
    keys, values = layer.keys, layer.values
    store = CompressedLayer(keys, values, empty.policy, empty.sliding_window, empty.key_map)
    store.append(keys.detach(), values.detach())
    # What a sliding layer has let go of was seen all the same.
    store.evicted = layer.get_seq_length() - keys.shape[2]
    if mask is not None:
        store.padding = _padding(mask, keys.shape[0], store.length).to(keys.device)
        store.observed = True
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
    if not ((mask == 0) | (mask == 1)).all():
        raise SixfoldError(
            "attention_mask: expected 1 for every token and 0 for padding, as tokenizers give it, "
            "got other numbers: pass the mask of two axes, not the additive one of attention."
        )
    return (mask.to(torch.int64).cumsum(1) == 0).sum(1)
