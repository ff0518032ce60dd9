"""The options of a cache, by name: editors complete them, type checkers check them."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from sixfold.cache import KeyMaps
from sixfold.kernels.types import CodeName
from sixfold.packing import Bits


class CacheOptions(TypedDict, total=False):
    """Arguments of `TurboQuantCache` beside the config and the bits; it says what they mean."""

    key_bits: Bits | None
    value_bits: Bits | None
    sink_tokens: int
    recent_window: int
    center_keys: bool
    equalize_keys: bool
    fit_tokens: int
    skip_layers: Sequence[int]
    per_layer: Mapping[int, Mapping[str, Any]] | None
    seed: int
    code: CodeName
    key_map: KeyMaps | None
