"""Launchers as torch operators: what torch.compile keeps whole, and fake tensors pass through."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor

_NAMESPACE = "sixfold"
# Not `custom_op`, which takes some ten microseconds a call more.
_LIBRARY = torch.library.Library(_NAMESPACE, "FRAGMENT")


def operator(
    schema: str, fake: Callable[..., Any]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a launcher, for every device, and put the operator in its place.

    It has no gradient: callers leave that to the reference, or detach. Every kernel is launched
    from here, on the device of the operator's first tensor.

    Args:
        schema: In PyTorch's notation, without namespace; says what is written in place.
        fake: Makes results like the launcher's of tensors without data.
    """
    name = schema.partition("(")[0]

    def registered(launcher: Callable[..., Any]) -> Callable[..., Any]:
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, on_its_device(launcher), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=_LIBRARY)
        found: Callable[..., Any] = getattr(getattr(torch.ops, _NAMESPACE), name).default
        return found

    return registered


def on_its_device(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """The launcher with the device of its first tensor current: Triton launches on that one."""

    @wraps(launcher)
    def guarded(first: Tensor, *arguments: Any, **options: Any) -> Any:
        with current(first.device):
            return launcher(first, *arguments, **options)

    return guarded


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a device the current one of its kind; there is one processor only."""
    if device.type == "cpu":
        return nullcontext()
    guard: AbstractContextManager[Any] = getattr(torch, device.type).device(device)
    return guard


def in_place(*_: Any) -> None:
    """The fake of an operator that returns nothing."""
