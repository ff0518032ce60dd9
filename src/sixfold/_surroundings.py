"""What Sixfold computes depends on no caller's autocast, inference mode or compiler."""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")

# The common ones first.
_DEVICE_TYPES = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla", "ipu", "maia")


def outside_autocast(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """`function`, run with autocast off: every dtype within it is chosen, and float32 is needed.

    Autocast would round the operands of matrix products to 16 bits and refuse float64.
    """

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        # A twentieth of what asking for every type of device takes.
        if torch._C._is_any_autocast_enabled():
            for device_type in (*_DEVICE_TYPES, torch._C._get_privateuse1_backend_name()):
                if torch.is_autocast_enabled(device_type):
                    with torch.autocast(device_type, enabled=False):
                        return run(*args, **kwargs)
        return function(*args, **kwargs)

    return run


def outside_inference_mode(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """`function`, run without inference mode: what that makes cannot be changed outside of it."""

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with ordinary_tensors():
            return function(*args, **kwargs)

    return run


def ordinary_tensors() -> AbstractContextManager[None]:
    """A block whose tensors can be changed, and used by autograd, outside of inference mode."""
    return _left() if torch.is_inference_mode_enabled() else nullcontext()


@contextmanager
def _left() -> Iterator[None]:
    # To leave inference mode turns gradients on, and a signal handler would run with them.
    with torch.inference_mode(False), torch.no_grad():
        yield


def untraced(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """`function`, which `torch.compile` leaves to Python: its caller's graph is interrupted."""

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if torch.compiler.is_compiling():
            # Asked for here: what compiles takes seconds to import, and is here already.
            whole: Callable[_P, _R] = torch._dynamo.disable(function)
            return whole(*args, **kwargs)
        return function(*args, **kwargs)

    return run
