"""The compiled extension, or why there is none."""

import importlib
import importlib.util
from functools import cache
from types import ModuleType
from typing import Any

EXTENSION = "sixfold._cpu"


@cache
def extension() -> ModuleType | str:
    """The compiled extension, or why there is none and what to do about it."""
    if importlib.util.find_spec(EXTENSION) is None:
        return (
            f"the compiled extension {EXTENSION} was not built with this install: install a C++ "
            "compiler (GCC 11 or later, or Clang), then reinstall with SIXFOLD_REQUIRE_EXTENSION=1 "
            "in the environment to see what goes wrong"
        )
    try:
        return importlib.import_module(EXTENSION)
    except ImportError as error:
        return f"the compiled extension {EXTENSION} cannot be loaded ({error}): reinstall sixfold"


def compiled() -> Any:
    """The compiled extension.

    Raises:
        ImportError: There is none; the message says why.
    """
    found = extension()
    if isinstance(found, str):
        raise ImportError(found)
    return found
