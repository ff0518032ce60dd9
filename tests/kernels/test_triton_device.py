"""Triton kernels are launched on the device of their tensors, whichever is current."""

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sixfold.kernels._triton", exc_type=ImportError)

from sixfold.kernels import _dispatch
from sixfold.kernels._triton import operators
from sixfold.kernels.rotate import rotate
from sixfold.rotation import Rotation

KERNELS = Path(_dispatch.__file__).parent
CPU = torch.device("cpu")


def launches(tree: ast.AST) -> list[ast.AST]:
    """Calls of a subscript: kernel[grid](...)."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [call for call in calls if isinstance(call.func, ast.Subscript)]


def is_operator(function: ast.AST) -> bool:
    decorators = getattr(function, "decorator_list", [])
    return any(ast.unparse(d).startswith("operator(") for d in decorators)


def test_every_launch_is_in_an_operator() -> None:
    guarded = 0
    for path in KERNELS.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if "triton" not in path.read_text(encoding="utf-8"):
            continue
        inside = [x for node in ast.walk(tree) if is_operator(node) for x in launches(node)]
        outside = [ast.unparse(x)[:60] for x in launches(tree) if x not in inside]
        assert not outside, f"{path.name}: {outside}"
        guarded += len(inside)
    assert guarded >= 8


def test_a_device_is_current_for_a_launch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []

    @contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        events.append(("enter", wanted.index))
        yield
        events.append(("leave", wanted.index))

    monkeypatch.setattr(torch.cuda, "device", device)
    with operators.current(torch.device("cuda", 1)):
        events.append("launch")
    assert events == [("enter", 1), "launch", ("leave", 1)]


def test_operators_launch_so(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    seen, current = [], operators.current
    monkeypatch.setattr(operators, "current", lambda d: seen.append(d) or current(d))
    monkeypatch.setenv("SIXFOLD_BACKEND", "triton")
    rotate(torch.ones(2, 64), Rotation(64).turns(CPU), Rotation(64).factor(CPU))
    assert seen == [CPU]
