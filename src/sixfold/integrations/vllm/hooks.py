"""Functions of vLLM that ask us first."""

import functools
from collections.abc import Callable
from typing import Any


def wrap_once(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Put another function in the place of a module's, or of a class method, unless one of ours is.

    Args:
        owner: The module or class.
        name: Of the function.
        make: From the function there, without its class bound, to ours.
    """
    found = getattr(owner, name)
    inner = getattr(found, "__func__", found)
    if getattr(inner, "knows_sixfold", False):
        return
    ours = functools.wraps(inner)(make(inner))
    ours.knows_sixfold = True  # type: ignore[attr-defined]
    setattr(owner, name, ours if inner is found else classmethod(ours))
