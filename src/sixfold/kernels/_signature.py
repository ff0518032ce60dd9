"""What an operation's annotations say about its arguments, and who breaks it.

Kernels refuse what does not fit as they read it, each in its own words or in PyTorch's. An
operation that fails is explained here from its signature, so that callers get one kind of error;
one that does not fail pays nothing for it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin

import torch
from torch import Tensor

from sixfold.arguments import FLOATS, choice, dense, flag, real, shown, whole
from sixfold.errors import ShapeError, SixfoldError
from sixfold.packing import check_bits


def explain(annotations: Mapping[str, Any], given: Mapping[str, Any], error: Exception) -> NoReturn:
    """Raise what the arguments of a failed call break, or `error` itself if it is none of theirs.

    Raises:
        SixfoldError: An argument is none of what its annotation allows.
        ShapeError: Each is for itself, but they do not fit together.
    """
    try:
        _check_all(given, annotations)
    except SixfoldError as reason:
        raise reason from error
    if type(error) not in _OF_ARGUMENTS or any(word in str(error) for word in _OF_OTHERS):
        raise error
    found = ", ".join(f"{name} {_described(value)}" for name, value in given.items())
    words = str(error).partition("\n")[0]
    raise ShapeError(f"expected arguments that fit together, got {found}: {words}") from error


# What Python and PyTorch raise for arguments: errors of devices and compilers are subclasses of
# these.
_OF_ARGUMENTS = (
    *(TypeError, ValueError, IndexError, KeyError, AttributeError),
    *(RuntimeError, NotImplementedError, ZeroDivisionError, OverflowError),
)
# Told by their text, as they have no types of their own: a lack of memory on a CPU, and tensors of
# inference mode that autograd cannot save.
_OF_OTHERS = "alloc", "Inference tensor"


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return f"a {type(value).__name__}" if isinstance(value, tuple | list) else shown(value)


class _Call:
    """Sizes of named axes, and the device, that the arguments of one call must share."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.sizes: dict[str, Any] = {}
        self.device = device


def _check_all(
    values: Mapping[str, Any],
    annotations: Mapping[str, Any],
    owner: str = "",
    device: torch.device | None = None,
) -> None:
    call = _Call(device)
    for name, value in values.items():
        _check(owner + name, value, annotations[name], call)


def _check(name: str, value: Any, annotation: Any, call: _Call) -> None:
    """Refuse a value that is none of what the annotation allows.

    Raises:
        SixfoldError: It is none of them.
    """
    options = [x for x in _options(annotation) if x is not NoneType]
    if value is None and len(options) < len(list(_options(annotation))):
        return
    arrays = [x for x in options if hasattr(x, "dim_str")]
    if arrays:
        _check_tensor(name, value, arrays, call)
    elif name.endswith("bits"):
        _own(name, value, lambda name, value: check_bits(value, name))
    elif get_origin(annotation) is Literal:
        choice(name, value, get_args(annotation))
    elif (checked := _SCALARS.get(options[0])) is not None:
        checked(name, value)
    else:
        _check_group(name, value, annotation, call)


def _options(annotation: Any) -> Iterator[Any]:
    yield from (annotation,) if hasattr(annotation, "dim_str") else _members(annotation)


def _members(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) in (Literal, Sequence):
        return (annotation,)
    return get_args(annotation) or (annotation,)


def _dtype(name: str, value: Any) -> None:
    if value not in FLOATS:
        raise SixfoldError(f"{name} must be a floating dtype, such as torch.float32, got {value!r}")


# Numbers of a kernel are Python's own: what `arguments` would convert has not been converted here.
_SCALARS: dict[Any, Callable[[str, Any], object]] = {
    int: lambda name, value: _own(name, value, whole),
    float: lambda name, value: _own(name, value, real),
    bool: flag,
    torch.dtype: _dtype,
}


def _own(name: str, value: Any, check: Callable[[str, Any], object]) -> None:
    check(name, value)
    if type(value) not in (int, float):
        raise SixfoldError(f"{name} must be a number of Python's own types, got {shown(value)}")


def _check_group(name: str, value: Any, annotation: Any, call: _Call) -> None:
    """Named tuples of arguments, or sequences of such tuples."""
    if get_origin(annotation) is Sequence:
        if not isinstance(value, list | tuple) or hasattr(value, "_fields"):
            raise SixfoldError(f"{name} must be a list, got {shown(value)}")
        for index, member in enumerate(value):
            _check_group(f"{name}[{index}]", member, get_args(annotation)[0], call)
    elif hasattr(annotation, "_fields"):
        if not isinstance(value, annotation):
            raise SixfoldError(f"{name} must be a {annotation.__name__}, got {shown(value)}")
        fields = value._asdict()
        _check_all(fields, annotation.__annotations__, f"{name}.", call.device)
    elif isinstance(annotation, type) and not isinstance(value, annotation):
        raise SixfoldError(f"{name} must be a {annotation.__name__}, got {shown(value)}")
    elif get_origin(annotation) is dict and type(value) is not dict:
        raise SixfoldError(f"{name} must be a dict, got {shown(value)}")


def _check_tensor(name: str, x: Any, options: list[Any], call: _Call) -> None:
    dense(name, x)
    dtypes = {dtype for option in options for dtype in _dtypes(option)}
    if x.dtype not in dtypes:
        expected = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise SixfoldError(f"{name} must be of dtype {expected}, got {x.dtype}; convert it")
    axes = options[0].dim_str.split()
    if "..." not in axes and not _fits(x, axes, call.sizes):
        known = {axis: size for axis, size in call.sizes.items() if axis in " ".join(axes)}
        raise ShapeError(
            f"{name} must have the shape [{', '.join(axes)}] with {known}, got {list(x.shape)}"
        )
    if call.device is None:
        call.device = x.device
    elif x.device != call.device:
        raise SixfoldError(
            f"{name} is on {x.device}, other arguments are on {call.device}; move it with .to()"
        )


def _dtypes(option: Any) -> list[torch.dtype]:
    found = [getattr(torch, str(name), None) for name in option.dtypes]
    wide = [x for x in found if x in FLOATS]
    return wide or [x for x in found if isinstance(x, torch.dtype)]


def _fits(x: Tensor, axes: list[str], sizes: dict[str, Any]) -> bool:
    """Whether a shape agrees with the axes' names; the sizes of new names are noted."""
    shape = list(x.shape)
    variadic = [i for i, axis in enumerate(axes) if axis.startswith("*")]
    if variadic:
        where = variadic[0]
        stop = len(shape) - (len(axes) - where - 1)
        if stop < where or sizes.setdefault(axes[where], shape[where:stop]) != shape[where:stop]:
            return False
        axes, shape = axes[:where] + axes[where + 1 :], shape[:where] + shape[stop:]
    if len(axes) != len(shape):
        return False
    return all(_agrees(*pair, sizes) for pair in zip(axes, shape, strict=True))


def _agrees(axis: str, size: int, sizes: dict[str, Any]) -> bool:
    if axis.isdigit():
        return size == int(axis)
    if axis.startswith("#"):
        return size == 1 or sizes.get(axis[1:], size) == size
    return axis.startswith("{") or bool(sizes.setdefault(axis, size) == size)
