"""What every measurement needs to know of a cache: how to make one, fork it and count its bytes."""

import copy
from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from sixfold.integrations.transformers import TurboQuantCache

MakeCache: TypeAlias = Callable[[PreTrainedModel], Cache]
"""Builds an empty cache for a model; a peer is measured by writing one of these."""


def compressed(bits: float, **options: Any) -> MakeCache:
    """Make a `TurboQuantCache` at `bits`; the options are those of its `for_model`.

    It waits for no tokens: what is measured is codes, of a short text, too.
    """
    options = {"fit_tokens": 0, **options}
    return lambda model: TurboQuantCache.for_model(model, bits=bits, **options)


def dequantizing(bits: float, **options: Any) -> MakeCache:
    """Make a `TurboQuantCache` that hands out dequantized tensors, whatever the model could do."""
    options = {"fit_tokens": 0, **options}
    return lambda model: TurboQuantCache(model.config, bits=bits, **options)


def uncompressed(model: PreTrainedModel) -> Cache:
    """Make the cache transformers itself would use."""
    return DynamicCache(config=model.config)


def fork(cache: Cache) -> Cache:
    """A second cache that starts from the same tokens and may then go its own way."""
    forked = cache.fork() if hasattr(cache, "fork") else copy.deepcopy(cache)
    assert isinstance(forked, Cache)
    return forked


def held_bytes(cache: Cache) -> int:
    """The bytes a cache says it holds, or else those of its layers' keys and values."""
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes)
    return sum(tensor.nbytes for tensor in _keys_and_values(cache))


def half_precision_bytes(cache: Cache) -> int:
    """What the tokens of a cache take uncompressed, at 16 bits a value."""
    if hasattr(cache, "uncompressed_nbytes"):
        return int(cache.uncompressed_nbytes)
    return sum(2 * tensor.numel() for tensor in _keys_and_values(cache))


def _keys_and_values(cache: Cache) -> list[Tensor]:
    found = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return [tensor for tensor in found if isinstance(tensor, Tensor)]
