"""Tests, and the run-time type checker they run under."""

from typing import Any, Self

from beartype import BeartypeConf, FrozenDict, beartype

check = beartype(
    conf=BeartypeConf(
        # As for mypy (PEP 484), a whole number is a float.
        is_pep484_tower=True,
        # The import hook decorates methods, not classes: beartype cannot know what `Self` is.
        hint_overrides=FrozenDict({Self: Any}),
    )
)
