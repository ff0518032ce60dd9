"""How tensors reach the compiled extension: as addresses that were checked here.

A DLPack exchange costs 2 µs a tensor, an address 0.2 µs, and a decode step passes dozens. The
extension trusts what it is given, so every address must come from `address`.
"""

import importlib
import importlib.util
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sixfold.errors import ShapeError

EXTENSION = "sixfold._cpu"


def address(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Where the elements of a contiguous CPU tensor of this dtype and shape start.

    Raises:
        ShapeError: It is another tensor than that.
    """
    if x.dtype is not dtype or x.shape != shape or not (x.is_contiguous() and x.is_cpu):
        raise ShapeError(
            f"{name}: expected a contiguous {dtype} tensor {list(shape)} on the cpu, got "
            f"{x.dtype} {list(x.shape)} on {x.device}, strides {list(x.stride())}."
        )
    start = x.data_ptr()
    # Not by `memory`: a decode step passes dozens of tensors.
    return start if start or not x.numel() else memory(name, x)


def memory(name: str, x: Tensor) -> int:
    """Where the elements of a tensor start.

    Raises:
        ShapeError: It has elements, and nowhere (fake, lazy, or its storage was freed).
    """
    start = x.data_ptr()
    if not start and x.numel():
        raise ShapeError(
            f"{name}: expected a tensor with its numbers in memory, got one without any: it is on "
            f"{x.device}, fake, lazy, or its storage was freed; clone it before."
        )
    return start


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
