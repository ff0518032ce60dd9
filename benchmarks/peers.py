"""Other quantized caches that transformers offers."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from torch import Tensor
from transformers import Cache, PreTrainedModel, QuantizedCache, cache_utils

from sixfold.eval.caches import MakeCache, held_bytes

# Group size and window are those of transformers' own documentation.
_GROUPED = {"nbits": 4, "q_group_size": 64, "residual_length": 128}
# Transformers 5.20 has none yet.
HAS_FP8 = hasattr(cache_utils, "Fp8QuantizedLayer")
_BACKENDS: dict[str, tuple[str, str, dict[str, int]]] = {
    "fp8": ("torch", "fp8", {}),
    "quanto": ("optimum.quanto", "quanto 4 bits", _GROUPED),
    "hqq": ("hqq", "hqq 4 bits", _GROUPED),
}


def installed_peers() -> dict[str, MakeCache]:
    """`QuantizedCache` on each of its backends that is there and can be imported."""
    return {
        f"transformers QuantizedCache, {label}": _maker(backend, options)
        for backend, (package, label, options) in _BACKENDS.items()
        if _installed(package) and (backend != "fp8" or HAS_FP8)
    }


def cache_bytes(cache: Cache) -> int:
    """Bytes a cache holds, those of quantized caches included, which do not count themselves."""
    if not isinstance(cache, QuantizedCache):
        return held_bytes(cache)
    found = {id(tensor): tensor.nbytes for tensor in _tensors(cache.layers)}
    return sum(found.values())


def _tensors(x: Any) -> Iterator[Tensor]:
    if hasattr(x, "__tensor_flatten__"):
        for name in x.__tensor_flatten__()[0]:
            yield from _tensors(getattr(x, name))
    elif isinstance(x, Tensor):
        yield x
    elif isinstance(x, list | tuple):
        for part in x:
            yield from _tensors(part)
    elif hasattr(x, "__dict__") or isinstance(x, dict):
        yield from _tensors(list((x if isinstance(x, dict) else vars(x)).values()))


def _installed(package: str) -> bool:
    root = package.partition(".")[0]
    return find_spec(root) is not None and find_spec(package) is not None


def _maker(backend: str, options: dict[str, int]) -> MakeCache:
    def make(model: PreTrainedModel) -> Cache:
        cache: Cache = QuantizedCache(backend, model.config, **options)
        return cache

    return make
