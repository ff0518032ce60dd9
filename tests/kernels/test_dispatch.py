"""The choice of a backend, and what is said when it cannot be had."""

import importlib
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
import torch

from sixfold.errors import BackendError
from sixfold.kernels import _dispatch
from sixfold.kernels._dispatch import available_backends, implementation, missing_backends

CPU = torch.device("cpu")


@pytest.fixture
def rotate_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose modules are the backends of `rotate`: at first the reference alone."""
    package = tmp_path / "made_up_kernels"
    folder = package / "rotate"
    for operation in _dispatch.OPERATIONS:
        (package / operation).mkdir(parents=True)
        (package / operation / "__init__.py").touch()
    for module in (package / "__init__.py", folder / "reference.py"):
        module.touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(_dispatch, "__package__", "made_up_kernels")
    monkeypatch.delenv("SIXFOLD_BACKEND", raising=False)
    _dispatch._loaded.clear()
    yield folder
    _dispatch._loaded.clear()
    for found in [name for name in sys.modules if name.startswith("made_up_kernels")]:
        del sys.modules[found]


def name(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[-1]


@pytest.mark.parametrize(
    "operation",
    ["rotate", "encode", "decode", "scores", "trellis", "attention"],
)
def test_every_operation_has_a_reference(operation: str) -> None:
    assert available_backends(operation)[0] == "reference"


def test_a_new_module_is_enough(rotate_folder: Path) -> None:
    (rotate_folder / "cpu.py").write_text("")
    assert name(implementation("rotate", CPU)) == "cpu"
    assert available_backends("rotate") == ("reference", "cpu")


def test_a_backend_that_cannot_be_imported_is_passed_over(rotate_folder: Path) -> None:
    (rotate_folder / "cpu.py").write_text("import a_module_that_is_not_there")
    assert name(implementation("rotate", CPU)) == "reference"
    assert "a_module_that_is_not_there" in missing_backends("rotate")["cpu"]


def test_the_environment_overrides(rotate_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (rotate_folder / "cpu.py").write_text("")
    monkeypatch.setenv("SIXFOLD_BACKEND", "reference")
    assert name(implementation("rotate", CPU)) == "reference"
    monkeypatch.setenv("SIXFOLD_BACKEND", "")
    assert name(implementation("rotate", CPU)) == "cpu"


def test_unknown_backend_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIXFOLD_BACKEND", "fortran")
    with pytest.raises(BackendError, match=r"must be one of .*'fortran'.*available.*reference"):
        implementation("rotate", CPU)


@pytest.mark.usefixtures("rotate_folder")
def test_missing_backend_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIXFOLD_BACKEND", "cpu")
    with pytest.raises(BackendError, match=r"cpu backend of 'rotate' is missing.*reference"):
        implementation("rotate", CPU)


def test_an_old_triton_counts_as_missing() -> None:
    """torch 2.6 brings Triton 3.2, which lacks what the kernels are written with."""
    code = (
        "import os, sys, types; fake = types.ModuleType('triton'); fake.__version__ = '3.2.0'; "
        "sys.modules['triton'] = sys.modules['triton.language'] = fake; "
        "import sixfold.kernels._dispatch as d; print(d.missing_backends('decode')['triton'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("the kernels need Triton 3.6 or later, found 3.2.0"), done.stderr


def test_a_triton_that_is_new_enough_is_used() -> None:
    """Tests of kernels that cannot be imported are skipped, which nothing else would tell."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if tuple(map(int, version("triton").split(".")[:2])) < (3, 6):
        pytest.skip("the kernels need Triton 3.6 or later")
    importlib.import_module("sixfold.kernels._triton")


def test_slow_kernels_are_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SIXFOLD_BACKEND", raising=False)
    monkeypatch.setattr(_dispatch, "_said", set())
    monkeypatch.setattr(_dispatch, "_load", lambda operation, backend: "no compiler was found")
    said = _dispatch.slow_kernels(CPU)
    assert said is not None
    assert "no compiler was found" in said
    assert "`sixfold doctor`" in said
    assert _dispatch.slow_kernels(CPU) is None


def test_devices_without_kernels_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SIXFOLD_BACKEND", raising=False)
    monkeypatch.setattr(_dispatch, "_said", set())
    said = _dispatch.slow_kernels(torch.device("mps"))
    assert said is not None
    assert "no kernels for mps devices" in said
    assert _dispatch.slow_kernels(torch.device("mps")) is None
    assert _dispatch.slow_kernels(torch.device("meta")) is None


def test_who_chooses_the_reference_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIXFOLD_BACKEND", "reference")
    monkeypatch.setattr(_dispatch, "_said", set())
    monkeypatch.setattr(_dispatch, "_load", lambda operation, backend: "no compiler was found")
    assert _dispatch.slow_kernels(CPU) is None
