"""Key maps of a whole transformers cache: given to its layers, and taken from them."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from sixfold.arguments import shown
from sixfold.cache import CachePolicy, KeyMaps
from sixfold.errors import ShapeError, SixfoldError
from sixfold.integrations.transformers.layer import TurboQuantLayer
from sixfold.integrations.transformers.model_layers import model_layers
from sixfold.kernels.types import KeyMap
from sixfold.packing import PAGE_TOKENS


def pin(layers: Sequence[Any], maps: Any) -> None:
    """Give every compressed layer its map; without `maps` they fit their own.

    Raises:
        SixfoldError: `maps` are none.
        ShapeError: A compressed layer has no map, or a map no layer.
    """
    if maps is None:
        return
    if not isinstance(maps, KeyMaps):
        raise SixfoldError(
            f"key_map must be a sixfold.KeyMaps, got {shown(maps)}: load one with "
            "sixfold.KeyMaps.load(path), or take one from a cache with cache.key_maps()"
        )
    numbers = _numbers(layers)
    # Layers that this cache leaves uncompressed may have one: the same maps serve both.
    strange = sorted(n for n in maps.layers if n >= len(layers))
    if missing := sorted(numbers - maps.layers.keys()) or strange:
        raise ShapeError(
            f"key_map: expected maps of the layers {sorted(numbers)}, got those of "
            f"{list(maps.layers)}: they differ in {missing}; take them from a cache of this model."
        )
    for number in numbers:
        layers[number].key_map = maps[number]


def check_maps(layers: Sequence[Any], model: PreTrainedModel) -> None:
    """Compare the maps given to `layers` with the keys of the model's, as far as it says.

    Raises:
        ShapeError: A map is for keys of another shape.
    """
    pinned = {n: layers[n].key_map for n in _numbers(layers) if layers[n].key_map is not None}
    known = model_layers(model.config, model) if pinned else []
    for number, key_map in sorted(pinned.items()):
        own = known[number]
        if own.shape is None:
            continue
        found, expected = tuple(key_map.mean.shape[1:]), own.shape[:2]
        if found != expected:
            raise ShapeError(
                f"key_map: layer {number} has {expected[0]} KV heads of {expected[1]} dimensions, "
                f"its map is for {found[0]} of {found[1]}: take it from a cache of this model."
            )


def maps_in_use(layers: Sequence[Any]) -> dict[int, KeyMap]:
    """The map of every compressed layer, by its number.

    Raises:
        SixfoldError: A layer has none yet.
    """
    found = {}
    for number in sorted(_numbers(layers)):
        layer = layers[number]
        prefix = None if layer.tokens is None else layer.tokens.prefix
        key_map = layer.key_map if prefix is None else prefix.key_map
        if key_map is None:
            raise SixfoldError(
                f"layer {number} has no key map yet, after {layer.get_seq_length()} tokens: one is "
                f"fitted when {_needed(layer.policy)} tokens have been attended."
            )
        found[number] = key_map
    return found


def _needed(policy: CachePolicy) -> int:
    return max(policy.recent_window + PAGE_TOKENS, policy.least_tokens)


def _numbers(layers: Sequence[Any]) -> set[int]:
    return {n for n, layer in enumerate(layers) if isinstance(layer, TurboQuantLayer)}
