"""Run transformers' own tests with compressed caches in place of `DynamicCache`.

    python -m tools.transformers_tests CHECKOUT [--fused] tests/models/llama -k "generate or beam"

CHECKOUT is a directory that holds the `tests` of transformers, of the installed version or near it.
Every `DynamicCache` that a model or `generate` makes from a config becomes a `TurboQuantCache` at 8
bits, without windows; where Sixfold refuses the model it stays what it was. With `--fused` those
that `generate` makes attend on their codes.
"""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import cache_utils, generation

from sixfold import TurboQuantCache
from sixfold.errors import UnsupportedModelError

DYNAMIC_CACHE = cache_utils.DynamicCache
OPTIONS: dict[str, Any] = {"bits": 8, "sink_tokens": 0, "recent_window": 0}


class _Replaced(type):
    """Makes compressed caches, and takes them for what they replace."""

    model: Any = None  # what `generate` makes a cache for, where it is to be fused
    made = refused = 0

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("config")
        if args or config is None:
            return DYNAMIC_CACHE(*args, **kwargs)
        try:
            fused = _Replaced.model
            cache = (
                TurboQuantCache(config, **OPTIONS)
                if fused is None
                else TurboQuantCache.for_model(fused, **OPTIONS)
            )
        except UnsupportedModelError:
            _Replaced.refused += 1
            return DYNAMIC_CACHE(*args, **kwargs)
        _Replaced.made += 1
        return cache

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, DYNAMIC_CACHE | TurboQuantCache)


class CompressedDynamicCache(metaclass=_Replaced):
    """Stands for `DynamicCache` wherever it is imported from now on."""


def replace(fused: bool) -> None:
    """Replace `DynamicCache`, before any model is imported."""
    cache_utils.DynamicCache = CompressedDynamicCache
    generation.utils.DynamicCache = CompressedDynamicCache
    prepare = generation.utils.GenerationMixin._prepare_cache_for_generation

    def prepared(self: Any, *args: Any, **kwargs: Any) -> Any:
        _Replaced.model = self if fused else None
        try:
            return prepare(self, *args, **kwargs)
        finally:
            _Replaced.model = None

    generation.utils.GenerationMixin._prepare_cache_for_generation = prepared


def main(arguments: list[str]) -> int:
    """Run the tests; say how many caches were replaced."""
    if not arguments or arguments[0].startswith("-"):
        raise SystemExit(__doc__)
    checkout, *rest = arguments
    replace(fused="--fused" in rest)
    os.chdir(checkout)
    sys.path.insert(0, str(Path.cwd()))
    chosen = [argument for argument in rest if argument != "--fused"]
    status = pytest.main(["-q", "-p", "no:cacheprovider", "-W", "ignore", *chosen])
    print(f"{_Replaced.made} compressed caches made, {_Replaced.refused} refused")
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
