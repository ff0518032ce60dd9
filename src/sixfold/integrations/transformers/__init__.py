"""TurboQuant KV cache for Hugging Face transformers (5.20 and later)."""

from sixfold.integrations.transformers.cache import TurboQuantCache
from sixfold.integrations.transformers.config import layer_shapes
from sixfold.integrations.transformers.keyword import cache_argument

__all__ = ["TurboQuantCache", "cache_argument", "layer_shapes"]
