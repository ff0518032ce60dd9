"""`sixfold doctor` on the compiled kernels: what runs, what overrides, and why not faster."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from sixfold.cli import doctor
from sixfold.cli.app import app
from sixfold.kernels import _native
from sixfold.kernels._dispatch import NO_BACKEND


def processor(isa: str, available: list[str], missing: dict[str, list[str]]) -> SimpleNamespace:
    return SimpleNamespace(
        isa=lambda: isa,
        available_isas=lambda: available,
        missing_features=lambda: list(missing.items()),
        borrows_threads=True,
    )


@pytest.fixture(autouse=True)
def no_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for name in doctor._OVERRIDES:
        monkeypatch.delenv(name, raising=False)


def said() -> str:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    return " ".join(result.stdout.split())


def found() -> dict[str, Any]:
    result = CliRunner().invoke(app, ["doctor", "--json", "-"])
    assert result.exit_code == 0, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def test_the_extension_of_this_install() -> None:
    described, cpu = found()["extension"], _native.extension()
    if isinstance(cpu, str):
        assert described["problem"] == cpu
    else:
        assert described["problem"] is None
        assert described["isa"] == cpu.isa()
        assert described["available"] == cpu.available_isas()
        assert described["threads"] >= 1
        assert described["borrows_threads"] == cpu.borrows_threads


def test_a_missing_feature_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    old = processor("avx2", ["avx2", "portable"], {"avx512": ["avx512vbmi"]})
    monkeypatch.setattr(doctor, "extension", lambda: old)
    assert "The avx512 kernels need avx512vbmi, which this processor does not have" in said()
    assert found()["extension"]["missing"] == {"avx512": ["avx512vbmi"]}


def test_overrides_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    slowed = processor("avx2", ["avx512", "avx2", "portable"], {})
    monkeypatch.setattr(doctor, "extension", lambda: slowed)
    monkeypatch.setenv("SIXFOLD_ISA", "avx2")
    monkeypatch.setenv("SIXFOLD_CPU_EXACT", "1")
    text = said()
    assert "SIXFOLD_ISA=avx2 overrides the choice of instruction set." in text
    assert "Without SIXFOLD_ISA=avx2 the kernels would use avx512." in text
    assert "SIXFOLD_CPU_EXACT=1 chooses exactness" in text
    assert found()["overrides"] == {"SIXFOLD_ISA": "avx2", "SIXFOLD_CPU_EXACT": "1"}


def test_a_wrong_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if isinstance(_native.extension(), str):
        pytest.skip("there is no compiled extension")
    monkeypatch.setenv("SIXFOLD_ISA", "mmx")
    result = CliRunner().invoke(app, ["doctor"])
    assert (result.exit_code, "got 'mmx'" in result.stderr) == (2, True)


def test_an_install_without_the_extension_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    _native.extension.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(_native, "EXTENSION", "sixfold._not_there")
        reason = _native.extension()
    _native.extension.cache_clear()
    assert isinstance(reason, str)
    monkeypatch.setattr(doctor, "extension", lambda: reason)
    text = said()
    assert "install a C++ compiler" in text
    assert "SIXFOLD_REQUIRE_EXTENSION=1" in text
    assert found()["extension"]["problem"] == reason


def test_an_operation_without_such_a_backend_lacks_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    selected = {"trellis": "reference"}
    monkeypatch.setattr(
        doctor,
        "missing_backends",
        lambda name: {"cpu": NO_BACKEND if name == "trellis" else "gone"},
    )
    monkeypatch.setattr(
        doctor,
        "implementation",
        lambda name, _: SimpleNamespace(__name__=f"kernels.{selected.get(name, 'cpu')}"),
    )
    assert "Every operation runs on the fastest backend there is for it on cpu." in said()
    selected["encode"] = "reference"
    assert "The cpu backend of encode does not run: gone." in said()
