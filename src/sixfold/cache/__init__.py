"""The compressed key-value history of one attention layer, independent of any host framework."""

from sixfold.cache.accounting import LayerShape, cache_nbytes, uncompressed_nbytes
from sixfold.cache.engine import EngineLayer
from sixfold.cache.key_maps import KeyMaps
from sixfold.cache.layer import CompressedLayer
from sixfold.cache.policy import CachePolicy
from sixfold.cache.static import StaticLayer
from sixfold.cache.step import Step

__all__ = [
    "CachePolicy",
    "CompressedLayer",
    "EngineLayer",
    "KeyMaps",
    "LayerShape",
    "StaticLayer",
    "Step",
    "cache_nbytes",
    "uncompressed_nbytes",
]
