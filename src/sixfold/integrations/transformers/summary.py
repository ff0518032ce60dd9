"""What a cache says of itself when it is printed."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from sixfold.cache import cache_nbytes, uncompressed_nbytes
from sixfold.errors import SixfoldError
from sixfold.integrations.transformers.config import layer_shapes
from sixfold.integrations.transformers.layer import TurboQuantLayer
from sixfold.integrations.transformers.passes import grows

LONG_CONTEXT = 32768
"""Tokens of a long context: windows in full precision and tables hardly count there."""


def long_ratio(
    config: PreTrainedConfig, layers: Sequence[Any], tokens: int = LONG_CONTEXT
) -> float:
    """16-bit bytes of `tokens` tokens ÷ the bytes that such layers will hold of them.

    Args:
        config: The model's config.
        layers: All layers of a cache for it.
        tokens: Tokens of one sequence.
    """
    policies = [x.policy if isinstance(x, TurboQuantLayer) else None for x in layers]
    shapes = layer_shapes(config, policies)
    return uncompressed_nbytes(shapes, tokens=tokens) / cache_nbytes(shapes, tokens=tokens)


def summary(cache: Any) -> str:
    """Widths, layers, tokens and bytes of a `TurboQuantCache` in one line."""
    tokens = max((int(x.get_seq_length()) for x in cache.layers if grows(x)), default=0)
    parts = [_widths(cache.compressed_layers), f"{len(cache.layers)} layers"]
    parts.append(
        f"{tokens:,} tokens in {cache.nbytes / 1e6:.1f} MB "
        f"instead of {cache.uncompressed_nbytes / 1e6:.1f} MB"
    )
    try:
        ratio = long_ratio(cache.config, cache.layers)
        parts.append(f"{ratio:.2f} times smaller at {LONG_CONTEXT:,} tokens")
    except (SixfoldError, AttributeError, TypeError):
        # Shapes of a few architectures are known to the model alone, not to its config.
        pass
    return f"{type(cache).__name__}({', '.join(parts)})"


def _widths(layers: Sequence[TurboQuantLayer]) -> str:
    if not layers:
        return "uncompressed"
    keys = sorted({layer.policy.key_bits for layer in layers})
    values = sorted({layer.policy.value_bits for layer in layers})
    if keys == values:
        return f"{_range(keys)} bits"
    return f"{_range(keys)}-bit keys and {_range(values)}-bit values"


def _range(widths: Sequence[float]) -> str:
    ends = dict.fromkeys(f"{width:g}" for width in (widths[0], widths[-1]))
    return " to ".join(ends)
