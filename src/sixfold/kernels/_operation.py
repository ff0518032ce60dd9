"""Where an operation begins: its failures are explained, and its arguments made readable."""

import functools
import inspect
import math
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from sixfold._surroundings import outside_autocast
from sixfold.arguments import dense, number_of, real, shown, whole
from sixfold.errors import SixfoldError
from sixfold.kernels._signature import explain

_P = ParamSpec("_P")
_R = TypeVar("_R")
T = TypeVar("T", Tensor, Tensor | None)

# Below 2**52 no float32 logit is changed by capping it here or higher.
_NO_SOFTCAP = 2.0**64


def operation(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """An operation of the kernels: it runs outside autocast, and fails with a `SixfoldError`.

    What PyTorch, Python or the extension raise for arguments that the signature rules out becomes
    an error that names the argument. All else that goes wrong (no memory, an interrupt) stays.
    """
    signature = inspect.signature(function)
    run = outside_autocast(function)

    @functools.wraps(function)
    def explained(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        # Tracers neither need nor follow what explains a failure.
        if torch.compiler.is_compiling():
            return run(*args, **kwargs)
        try:
            # What `run` asks too, asked here: one call less where autocast is off.
            if not torch._C._is_any_autocast_enabled():
                return function(*args, **kwargs)
            return run(*args, **kwargs)
        except SixfoldError:
            raise
        except Exception as error:
            given = signature.bind(*args, **kwargs).arguments
            explain({n: p.annotation for n, p in signature.parameters.items()}, given, error)

    return explained


def plain(x: T) -> T:
    """The tensor with its numbers in memory.

    Lazy tensors have others there: of a negative view (`Tensor.imag` of a conjugate makes one) the
    opposite, of a zero tensor of autograd nothing at all.
    """
    # A tracer has no lazy tensors, and cannot ask.
    if x is None or torch.compiler.is_compiling():
        return x
    if x.is_neg():
        return x.resolve_neg()
    return x.new_zeros(x.shape) if x._is_zerotensor() else x


def plain_dense(name: str, x: Tensor) -> Tensor:
    """`plain` of an argument that nobody has checked before.

    Raises:
        SixfoldError: It is no dense tensor, or has no memory.
    """
    if not torch.compiler.is_compiling():
        dense(name, x)
    return plain(x)


def checked_softcap(softcap: float | None) -> float | None:
    """A finite positive number, or None where capping changes nothing.

    Raises:
        SixfoldError: It is neither.
    """
    if softcap is None:
        return None
    number = number_of(softcap)
    if number is None or math.isnan(number) or number <= 0:
        raise SixfoldError(
            f"softcap must be a positive number, or None for no soft-capping, got {shown(softcap)}"
        )
    return None if number > _NO_SOFTCAP else float(number)


def checked_window(window: int | None) -> int | None:
    """A positive whole number, or None.

    Raises:
        SixfoldError: It is neither.
    """
    if window is None or (type(window) is int and window > 0) or torch.compiler.is_compiling():
        return window
    return whole("sliding_window", window, 1)


def checked_scaling(scaling: float) -> float:
    """The factor of the logits: a NaN would make all of them NaN without a word.

    Raises:
        SixfoldError: It is no finite number.
    """
    # A tracer may know no more of it than that it is a number.
    if (type(scaling) is float and math.isfinite(scaling)) or torch.compiler.is_compiling():
        return scaling
    return real("scaling", scaling)
