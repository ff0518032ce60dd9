"""Caches whose layers code, or fit their key maps, in a way of a study's own."""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from sixfold import TurboQuantCache
from sixfold.eval.caches import MakeCache
from sixfold.integrations.transformers.layer import TurboQuantLayer


def with_layers(make_cache: MakeCache, options: Callable[[], tuple[Any, ...]]) -> MakeCache:
    """The same caches, with other layers.

    Args:
        make_cache: Makes caches all of whose layers are compressed.
        options: Called for every layer: how it codes (`make_code`), and how it fits (`fit`).
    """

    def make(model: PreTrainedModel) -> TurboQuantCache:
        cache = make_cache(model)
        assert isinstance(cache, TurboQuantCache)
        cache.layers = [
            TurboQuantLayer(layer.policy, layer.sliding_window, layer.fused, *options())
            for layer in cache.compressed_layers
        ]
        return cache

    return make
