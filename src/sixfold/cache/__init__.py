"""The compressed key-value history of one attention layer, independent of any host framework."""

from sixfold.cache.accounting import LayerShape, cache_nbytes, uncompressed_nbytes
from sixfold.cache.key_maps import KeyMaps
from sixfold.cache.layer import CompressedLayer
from sixfold.cache.policy import CachePolicy
from sixfold.cache.static import StaticLayer

__all__ = [
    "CachePolicy",
    "CompressedLayer",
    "KeyMaps",
    "LayerShape",
    "StaticLayer",
    "cache_nbytes",
    "uncompressed_nbytes",
]
