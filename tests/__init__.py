"""Tests, and the run-time type checker they run under."""

from typing import Any, Self

import torch

try:
    from beartype import BeartypeConf, FrozenDict, beartype
except ImportError:
    # A machine with a GPU may have no more than torch and pytest.
    if not torch.cuda.is_available():
        raise

    def check(function: Any) -> Any:
        """`function`, unchecked."""
        return function
else:
    check = beartype(
        conf=BeartypeConf(
            # As for mypy (PEP 484), a whole number is a float.
            is_pep484_tower=True,
            # The import hook decorates methods, not classes: beartype cannot know what `Self` is.
            hint_overrides=FrozenDict({Self: Any}),
        )
    )
