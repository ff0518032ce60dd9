"""What a cache will hold of a long context, counted from its layers alone."""

from collections.abc import Sequence
from typing import Any

from transformers import Cache, PreTrainedConfig

from sixfold.cache import LayerShape, uncompressed_nbytes
from sixfold.eval.peers.cache import PeerCache, PeerLayer
from sixfold.eval.peers.scheme import Scheme
from sixfold.integrations.transformers import TurboQuantCache
from sixfold.integrations.transformers.config import (
    COMPRESSED_TYPES,
    layer_types,
    uncompressed_shapes,
)
from sixfold.integrations.transformers.summary import LONG_CONTEXT, long_ratio

WHY_TWO_NUMBERS = (
    "Sixfold keeps the first 4 and the last 64 to 127 tokens exactly, and one table a head: much "
    f"of a short context, next to nothing of {LONG_CONTEXT:,} tokens."
)
"""The footnote wherever bits or ratios of a short context stand beside those of a long one."""


def bits_per_value(config: PreTrainedConfig, cache: Cache, tokens: int = LONG_CONTEXT) -> float:
    """Bits a key or value coordinate that a cache will hold of `tokens`, everything counted.

    Args:
        config: The model's config.
        cache: A cache of it: Sixfold's, a simulated peer, or transformers' own, at 16 bits.
        tokens: Tokens of one sequence.
    """
    if isinstance(cache, TurboQuantCache):
        return 16 / long_ratio(config, cache.layers, tokens)
    if not isinstance(cache, PeerCache):
        return 16.0
    shapes = uncompressed_shapes(config)
    kinds, layers = layer_types(config)[0], cache.layers
    attending = [x for kind, x in zip(kinds, layers, strict=True) if kind in COMPRESSED_TYPES]
    held = [_held(*pair, tokens) for pair in zip(attending, shapes, strict=True)]
    return 16 * sum(held) / uncompressed_nbytes(shapes, tokens=tokens)


def _held(layer: Any, shape: LayerShape, tokens: int) -> int:
    if isinstance(layer, PeerLayer):
        return stored_nbytes(*layer.schemes, [shape], tokens=tokens)
    return uncompressed_nbytes([shape], tokens=tokens)


def stored_nbytes(
    keys: Scheme,
    values: Scheme,
    shapes: Sequence[LayerShape],
    *,
    tokens: int,
    batch: int = 1,
    element_size: int = 2,
) -> int:
    """Bytes that a simulated peer of full attention holds after a prefill.

    Args:
        keys: How keys are stored.
        values: How values are stored.
        shapes: The model's attention layers.
        tokens: Tokens a sequence.
        batch: Sequences.
        element_size: Bytes a number of the model's dtype.

    Returns:
        Exactly `PeerCache.nbytes` of such a cache, which need not exist.
    """
    total = 0
    for shape in shapes:
        for scheme, dim in ((keys, shape.key_dim), (values, shape.value_dim)):
            coded = scheme.due(0, tokens)
            window = batch * shape.kv_heads * (tokens - coded) * dim * element_size
            total += window + scheme.nbytes(batch, shape.kv_heads, coded, dim, element_size)
    return total
