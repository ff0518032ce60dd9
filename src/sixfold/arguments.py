"""What callers pass, checked where it enters: one function for each kind of argument.

Each returns the argument as the rest of the library wants it (a NumPy integer becomes an `int`), or
raises the error that says what was expected, what came and what to do.
"""

import math
import operator
import os
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad

from sixfold.errors import OutOfRangeError, ShapeError, SixfoldError

T = TypeVar("T")

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Coordinates of a vector, projections of a sketch: beyond this no table could be made.
MOST_COORDINATES = 2**20
# Seeds have any size, but there is no use for more bits than this.
MOST_SEED = 2**128
_UNREADABLE = (TypeError, ValueError, RuntimeError, OverflowError)


def shown(value: object) -> str:
    """A value as messages show it, in one short line."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype}"
    try:
        text = repr(value)
    except ValueError:
        # Of an integer with more digits than Python writes.
        text = f"a {type(value).__name__} too long to show"
    return text if len(text) <= 80 else f"{text[:77]}..."


def whole(name: str, value: Any, least: int = 0, most: int = 2**63 - 1) -> int:
    """A whole number, from whatever Python takes for an index: not from `True` or 4.0.

    Raises:
        SixfoldError: It is none, or out of range.
    """
    number = value if type(value) is int else _index(value)
    if number is None or not least <= number <= most:
        open_end = most == 2**63 - 1 and (number is None or number <= most)
        bounds = f"at least {least}" if open_end else f"{least} to {most}"
        kind = "" if type(value) is int else ", a whole number"
        raise SixfoldError(f"{name} must be {bounds}{kind}, got {shown(value)}")
    return number


def _truth(value: Any) -> bool:
    """Whether it is true or false, which Python, PyTorch and NumPy 1 take for a number."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def _index(value: Any) -> int | None:
    if _truth(value):
        return None
    try:
        return operator.index(value)
    except _UNREADABLE:
        return None


def settle(spec: object, **fields: Any) -> None:
    """Let the fields of a frozen dataclass be what was made of them."""
    for name, value in fields.items():
        object.__setattr__(spec, name, value)


def real(name: str, value: Any) -> float:
    """A finite number.

    Raises:
        SixfoldError: It is none.
    """
    number = number_of(value)
    if number is None or not math.isfinite(number):
        raise SixfoldError(f"{name} must be a finite number, got {shown(value)}")
    return number


def number_of(value: Any) -> int | float | None:
    """The number that a scalar of Python, NumPy or PyTorch is, if it is one.

    An integer beyond all floats is infinite.
    """
    if type(value) is float:
        return value
    integer = value if type(value) is int else _index(value)
    if integer is not None:
        try:
            float(integer)
        except OverflowError:
            return math.inf if integer > 0 else -math.inf
        return integer
    if _truth(value) or isinstance(value, str | bytes) or getattr(value, "ndim", 0) != 0:
        return None
    try:
        # Of complex numbers there is none.
        return float(value)
    except _UNREADABLE:
        return None


def choice(name: str, value: Any, allowed: Sequence[T]) -> T:
    """The one of `allowed`, words or numbers, that `value` is.

    Raises:
        SixfoldError: It is none of them.
    """
    wanted = value if isinstance(value, str) else number_of(value)
    for each in allowed:
        if each == wanted and isinstance(each, str) == isinstance(value, str):
            return each
    expected = ", ".join(map(repr, allowed))
    raise SixfoldError(f"{name} must be one of {expected}, got {shown(value)}")


def sequence(name: str, value: Any) -> list[Any]:
    """The members of something that has several; text has none.

    Raises:
        SixfoldError: It cannot be iterated over.
    """
    if not isinstance(value, str | bytes):
        try:
            return list(value)
        except _UNREADABLE:
            pass
    raise SixfoldError(f"{name} must be a sequence, such as (0, 1), got {shown(value)}")


def flag(name: str, value: Any) -> bool:
    """True or False.

    Raises:
        SixfoldError: It is neither.
    """
    if type(value) is not bool:
        raise SixfoldError(f"{name} must be True or False, got {shown(value)}")
    return value


def path(value: Any) -> str | os.PathLike[str]:
    """A path.

    Raises:
        SixfoldError: It is no text and no path, or one that no file can have.
    """
    if not isinstance(value, str | os.PathLike):
        raise SixfoldError(f"path must be a string or a pathlib.Path, got {shown(value)}")
    text = os.fsdecode(value)
    if not text or "\0" in text:
        raise SixfoldError(f"path must name a file, got {shown(value)}")
    return value


def device(value: Any) -> torch.device:
    """A device that is there.

    Raises:
        SixfoldError: It is none, or this machine or this install of PyTorch lacks it.
    """
    if isinstance(value, torch.device | str) or type(value) is int:
        try:
            # Nothing is allocated, but whatever is missing is missed.
            return torch.empty(0, device=value).device
        except (RuntimeError, AssertionError, ValueError, NotImplementedError) as error:
            reason = str(error).partition("\n")[0]
            raise SixfoldError(
                f"device {shown(value)} cannot be used ({reason}): pass one that this machine has, "
                'such as "cpu"'
            ) from error
    raise SixfoldError(f"device must be a torch.device or its name, got {shown(value)}")


def float_dtype(value: Any) -> torch.dtype:
    """A dtype that tokens may have.

    Raises:
        SixfoldError: It is none of them.
    """
    if isinstance(value, torch.dtype) and value in FLOATS:
        return value
    expected = ", ".join(map(str, FLOATS))
    raise SixfoldError(f"dtype must be one of {expected}, got {shown(value)}")


def dense(name: str, x: Any) -> None:
    """Refuse what is no plain tensor: another type, or one whose numbers lie otherwise.

    Raises:
        SixfoldError: It is no tensor, or sparse, nested, of a vendor's layout, or not in memory;
            or it has a derivative in forward mode.
    """
    if not isinstance(x, Tensor):
        raise SixfoldError(
            f"{name} must be a torch tensor, got {type(x).__module__}.{type(x).__name__}; convert "
            f"it with torch.as_tensor({name}), which shares the memory of a numpy array"
        )
    if x.layout is not torch.strided or x.is_nested:
        kind = "nested" if x.is_nested else str(x.layout)
        raise SixfoldError(
            f"{name} must be a dense tensor, got one that is {kind}; convert it, for example with "
            f"{name}.to_dense() or torch.nested.to_padded_tensor"
        )
    if torch.compiler.is_compiling():
        return
    if _has_tangent(x):
        raise SixfoldError(
            f"{name} has a derivative in forward mode, which codes cannot pass on: compute it "
            "outside of torch.autograd.forward_ad.dual_level, or differentiate backwards"
        )
    try:
        held = _has_memory(x)
    except RuntimeError as error:
        raise SixfoldError(
            f"{name} must be a tensor with its numbers in memory, got one that stands for others, "
            "as inside torch.vmap or torch.func.grad: call this outside of it, on the whole batch"
        ) from error
    if not held:
        raise SixfoldError(
            f"{name} must be a tensor with its numbers in memory, got one whose storage was freed"
        )


def _has_tangent(x: Tensor) -> bool:
    # Asked in every step: outside of a level, as nearly always, there are none.
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def _has_memory(x: Tensor) -> bool:
    if type(x) is Tensor and x.data_ptr():
        return True
    if isinstance(x, FakeTensor):
        # Tools that trace run whole layers on fake tensors; the extension refuses them itself.
        return True
    # Of a lazy zero there are none, and of a tensor without values none are needed.
    return bool(x.data_ptr()) or x.is_meta or x._is_zerotensor() or not x.numel()


def rows(name: str, value: Any, count: int) -> Tensor:
    """Numbers of some of `count` sequences, int64 [rows]; a mask over all of them is taken too.

    Raises:
        SixfoldError: It is no tensor of one axis that holds whole numbers.
        ShapeError: The mask is of another number of sequences.
        OutOfRangeError: There is no such sequence. (On an accelerator the check would wait for it:
            there the device asserts.)
    """
    dense(name, value)
    if value.ndim != 1 or value.is_meta or value.is_floating_point() or value.is_complex():
        raise SixfoldError(
            f"{name} must be a tensor of one axis that holds numbers of sequences, got "
            f"{value.dtype} {list(value.shape)}; pass torch.tensor([0, 1]), say"
        )
    if value.dtype is torch.bool:
        if len(value) != count:
            raise ShapeError(
                f"{name}: expected a mask over the {count} sequences held, got {len(value)}"
            )
        chosen: Tensor = value.nonzero().flatten()
        return chosen
    # As int64, because PyTorch takes bytes for a mask.
    numbers: Tensor = value.to(torch.int64)
    if numbers.is_cpu and bool(((numbers < -count) | (numbers >= count)).any()):
        raise OutOfRangeError(
            f"{name} must be at least {-count} and below {count}, the number of sequences held, "
            f"got {numbers.tolist()}"
        )
    # Not every operation that takes rows counts from the end.
    return numbers.remainder(count) if count else numbers


def plain_floats(x: Any) -> bool:
    """Whether `floating` accepts it without a second look, as nearly always: asked in every step.

    Nobody asks while tracing: tensors have no memory there.
    """
    plain = type(x) is Tensor and x.dtype in FLOATS and x.layout is torch.strided
    try:
        return plain and not x.is_nested and x.data_ptr() != 0 and not _has_tangent(x)
    except RuntimeError:
        return False


def floating(name: str, x: Any) -> None:
    """Refuse what is no dense tensor of numbers with fractions.

    Raises:
        SixfoldError: It is not dense, or not of float16, bfloat16, float32 or float64.
    """
    if not torch.compiler.is_compiling() and plain_floats(x):
        return
    dense(name, x)
    if x.dtype not in FLOATS:
        raise SixfoldError(
            f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}; "
            f"convert it, for example with {name}.float()"
        )
