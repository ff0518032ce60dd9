"""What callers pass, made into what kernels read: where an operation begins, nowhere else."""

import math
from typing import TypeVar

import torch
from torch import Tensor

from sixfold.errors import SixfoldError

T = TypeVar("T", Tensor, Tensor | None)

# Below 2**52 no float32 logit is changed by capping it here or higher.
_NO_SOFTCAP = 2.0**64


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


def checked_softcap(softcap: float | None) -> float | None:
    """A finite positive number, or None where capping changes nothing.

    Raises:
        SixfoldError: It is neither.
    """
    if softcap is None:
        return None
    if math.isnan(softcap) or softcap <= 0:
        raise SixfoldError(
            f"softcap must be a positive number, or None for no soft-capping, got {softcap}"
        )
    return None if softcap > _NO_SOFTCAP else softcap
