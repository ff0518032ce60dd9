"""Which implementation of an operation runs: a choice by device that the user can override.

A backend of an operation is the module `sixfold.kernels.<operation>.<backend>`; adding the file
is enough for it to be found. One that cannot be imported (no Triton, no compiled extension)
counts as missing, and the reason is kept for error messages.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import torch

from sixfold._surroundings import untraced
from sixfold.errors import BackendError
from sixfold.kernels import _native

_P = ParamSpec("_P")
_R = TypeVar("_R")

BACKENDS = ("reference", "cpu", "triton")
ENVIRONMENT_VARIABLE = "SIXFOLD_BACKEND"

OPERATIONS = (
    "rotate",
    "encode",
    "decode",
    "scores",
    "nearest",
    "trellis",
    "attention",
)

# What quantizers are made of.
_OF_VECTORS = ("rotate", "encode", "decode", "scores")

NO_BACKEND = "not part of this install"
"""Why a backend is missing that an operation does not have."""

_UNTRACED = (
    "Sixfold's compiled CPU kernels cannot be traced: compile without fullgraph=True, or set "
    f"{ENVIRONMENT_VARIABLE}=reference"
)

_FASTEST = {"cpu": "cpu", "cuda": "triton"}


# A plain dictionary, which torch.compile can trace where it cannot import.
_loaded: dict[tuple[str, str], ModuleType | str] = {}
# Devices of which `slow_kernels` has been asked.
_said: set[str] = set()


def _load(operation: str, backend: str) -> ModuleType | str:
    """The module of a backend, or why there is none."""
    if (operation, backend) not in _loaded:
        # All at once: what runs first is seldom traced, and the rest is ready when it is.
        for each in OPERATIONS:
            _loaded[each, backend] = _import(each, backend)
    return _loaded[operation, backend]


def _import(operation: str, backend: str) -> ModuleType | str:
    name = f"{__package__}.{operation}.{backend}"
    if importlib.util.find_spec(name) is None:
        return NO_BACKEND
    try:
        return importlib.import_module(name)
    except ImportError as error:
        # "Cannot import name" is no help where the name is the extension's.
        reason = _native.extension() if backend == "cpu" else error
        return reason if isinstance(reason, str) else str(error)


def available_backends(operation: str) -> tuple[str, ...]:
    """Backends of `operation` that this install can run, for some device."""
    return tuple(name for name in BACKENDS if isinstance(_load(operation, name), ModuleType))


def missing_backends(operation: str) -> dict[str, str]:
    """Why each of the other backends of `operation` cannot run."""
    found = {name: _load(operation, name) for name in BACKENDS}
    return {name: reason for name, reason in found.items() if isinstance(reason, str)}


def implementation(operation: str, device: torch.device) -> ModuleType:
    """The module that runs `operation` on `device`.

    The fastest backend for the device if this install has it, otherwise the reference;
    `SIXFOLD_BACKEND` overrides.

    Raises:
        BackendError: The override names no backend, or one that this install lacks or that does
            not run on `device`.
    """
    override = os.environ.get(ENVIRONMENT_VARIABLE)
    if override:
        return _overridden(operation, override, device)
    backend = _FASTEST.get(device.type, "reference")
    module = _loaded.get((operation, backend)) or _load(operation, backend)
    if backend == "cpu" and not isinstance(module, str) and torch.compiler.is_compiling():
        # It would be interrupted all the same, where nobody could tell why.
        torch._dynamo.graph_break(msg=_UNTRACED)
    fallback = _load(operation, "reference") if isinstance(module, str) else module
    assert isinstance(fallback, ModuleType), fallback
    return fallback


def untraced_without_kernels(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """`method`, which a tracer leaves to Python unless it can trace kernels for its first argument.

    A graph that is interrupted within it could not be gone on with: PyTorch cannot make constant
    tables again that it has traced.
    """
    whole = untraced(method)

    @functools.wraps(method)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if torch.compiler.is_compiling():
            given: list[Any] = [*args, *kwargs.values(), None]
            device = getattr(given[1], "device", None)
            if not isinstance(device, torch.device) or not _traceable(device):
                return whole(*args, **kwargs)
        return method(*args, **kwargs)

    return run


def _traceable(device: torch.device) -> bool:
    """Whether kernels of vectors are loaded, and a tracer can follow them."""
    backend = os.environ.get(ENVIRONMENT_VARIABLE) or _FASTEST.get(device.type, "reference")
    loaded = [isinstance(_loaded.get((x, backend)), ModuleType) for x in _OF_VECTORS]
    return backend != "cpu" and all(loaded)


def slow_kernels(device: torch.device) -> str | None:
    """Why attention on codes is slow on `device`: said once a process, None where it is not."""
    # Weights on the meta device are offloaded: it does not say where they are computed with.
    if device.type in ("meta", *_said) or os.environ.get(ENVIRONMENT_VARIABLE):
        return None
    _said.add(device.type)
    backend = _FASTEST.get(device.type)
    reason: ModuleType | str = f"it has no kernels for {device.type} devices"
    if backend is not None:
        reason = _load("attention", backend)
    if not isinstance(reason, str):
        return None
    return (
        f"Sixfold runs in plain PyTorch here, slower than an uncompressed cache: {reason}. "
        "`sixfold doctor` says more."
    )


def _overridden(operation: str, backend: str, device: torch.device) -> ModuleType:
    if backend not in BACKENDS:
        raise BackendError(
            f"{ENVIRONMENT_VARIABLE} must be one of {', '.join(BACKENDS)} (or unset), got "
            f"{backend!r}; available for {operation!r}: {', '.join(available_backends(operation))}"
        )
    module = _load(operation, backend)
    if isinstance(module, str):
        raise BackendError(
            f"{ENVIRONMENT_VARIABLE}={backend}, but the {backend} backend of {operation!r} is "
            f"missing ({module}); use one of: {', '.join(available_backends(operation))}"
        )
    if backend == "triton" and device.type == "cpu" and not _triton_interprets():
        raise BackendError(
            f"{ENVIRONMENT_VARIABLE}=triton, but {operation!r} got tensors on the cpu, where "
            "Triton runs in its interpreter alone: set TRITON_INTERPRET=1 before Python starts, "
            "or move them to a GPU"
        )
    return module


def _triton_interprets() -> bool:
    # As Triton reads it.
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
