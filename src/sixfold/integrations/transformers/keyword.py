"""Under which name transformers takes and returns a cache: that has changed once."""

import inspect

from transformers import Cache, GenerationMixin

_PREPARE = inspect.signature(GenerationMixin.prepare_inputs_for_generation)

CACHE_KEYWORD = "cache" if "cache" in _PREPARE.parameters else "past_key_values"
"""`cache` from transformers 5.24 on, which warns of the older name, `past_key_values`."""


def cache_argument(cache: Cache) -> dict[str, Cache]:
    """The argument that hands `cache` to a model of the installed transformers.

    For code that runs on several versions: ``model(ids, **cache_argument(cache))``, and the same
    for ``model.generate``.
    """
    return {CACHE_KEYWORD: cache}
