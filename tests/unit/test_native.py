"""The compiled extension: which instructions run, what is refused, and that none leak."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from sixfold.errors import BackendError, ShapeError
from sixfold.kernels import _dispatch, _groups, _native

ROOT = Path(__file__).resolve().parents[2]
ISA = ROOT / "csrc/isa"
SOURCES = sorted((ROOT / "csrc").glob("*/*.h")) + sorted((ROOT / "csrc").glob("*/*.cpp"))
OBJECTS = sorted(ROOT.glob("build/*/CMakeFiles/_cpu.dir/csrc/isa/kernels_*.o"))


@pytest.fixture
def cpu() -> ModuleType:
    found = _native.extension()
    if isinstance(found, str):
        pytest.skip(found)
    return found


def test_the_best_available_instructions_run(
    cpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = cpu.available_isas()
    assert names[-1] == "portable"
    for unset in (None, ""):
        monkeypatch.delenv("SIXFOLD_ISA", raising=False)
        if unset is not None:
            monkeypatch.setenv("SIXFOLD_ISA", unset)
        assert cpu.isa() == names[0]
    for name in names:
        monkeypatch.setenv("SIXFOLD_ISA", name)
        assert cpu.isa() == name


def test_unknown_instructions_are_an_error(
    cpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIXFOLD_ISA", "sse2")
    with pytest.raises(BackendError, match=r"SIXFOLD_ISA must be .*portable, or unset, got 'sse2'"):
        cpu.isa()


def test_what_the_processor_lacks_is_named(cpu: ModuleType) -> None:
    missing = dict(cpu.missing_features())
    assert set(missing).isdisjoint(cpu.available_isas())
    assert all(features for features in missing.values())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/cpuinfo")
def test_available_means_that_linux_says_so(cpu: ModuleType) -> None:
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    flags = set(re.findall(r"\w+", text.partition("flags")[2].partition("\n")[0]))
    if not flags:
        pytest.skip("not an x86 processor")
    wanted = {"avx2", "fma", "f16c", "bmi2"}
    assert ("avx2" in cpu.available_isas()) == (wanted <= flags)
    wanted |= {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512vbmi"}
    assert ("avx512" in cpu.available_isas()) == (wanted <= flags)


@pytest.mark.skipif(not OBJECTS, reason="no build folder: not an editable install")
@pytest.mark.skipif(shutil.which("nm") is None, reason="binutils are not installed")
@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: path.name.partition(".")[0])
def test_a_translation_unit_shares_no_function(path: Path) -> None:
    # The linker keeps one of the equal inline functions of all translation units. If it kept one
    # compiled for AVX-512, every processor would run it.
    name = path.name.removeprefix("kernels_").partition(".")[0]
    command = ["nm", "--demangle", "--defined-only", str(path)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    symbols = [line.split(maxsplit=2)[1:] for line in lines]
    shared = [symbol for kind, symbol in symbols if kind in "wWvVuiT"]
    assert shared == [f"sixfold::{name}_kernels()"]


@pytest.mark.skipif(len(OBJECTS) < 2, reason="no build folder, or one instruction set")
def test_portable_kernels_are_about_as_large_as_others() -> None:
    # Few processors run them, every install compiles them.
    objects = {path.name.removeprefix("kernels_").partition(".")[0]: path for path in OBJECTS}
    portable = objects.pop("portable").stat().st_size
    assert portable < 1.25 * max(path.stat().st_size for path in objects.values())


def test_planes_are_described_once() -> None:
    # The programs that test it know them by themselves.
    files = [path for path in SOURCES if path.parent.name != "selftest"]
    tables = [path.name for path in files if "{4, 2, 1}" in path.read_text(encoding="utf-8")]
    assert tables == ["planes.h"]


def test_an_instruction_set_only_replaces_primitives() -> None:
    # One vocabulary: what a kernel calls on `Simd` exists for every instruction set.
    primitive = r"(?:SIXFOLD_INLINE|static constexpr) \w+ (\w+)\("
    known = set(re.findall(primitive, (ISA / "simd.h").read_text("utf-8")))
    assert len(known) > 30
    kernels = [path for path in SOURCES if path.name.endswith("-inl.h") or path.name == "wide.h"]
    text = "".join(path.read_text(encoding="utf-8") for path in kernels)
    called = set(re.findall(r"\b(?:Simd|V)::(?:template )?([a-z]\w*)(?=[(<])", text))
    assert len(called) > 30
    # Where Simd::kGrid or Simd::kTableCosts says that they are there.
    assert called - known == {"grid_cell", "mirror", "look_up_mirrored"}


def test_every_flag_is_asked_for() -> None:
    flags = (ISA / "isa.cmake").read_text(encoding="utf-8")
    source = (ISA / "dispatch.cpp").read_text(encoding="utf-8")
    for name in ("avx2", "avx512"):
        compiled = re.search(rf"SIXFOLD_FLAGS_{name}\s([^)]*)\)", flags)
        asked = source.partition(f"missing_for_{name}() {{")[2].partition("return")[0]
        assert compiled is not None
        wanted = set(re.findall(r"-m((?!prefer)\w+)", compiled[1]))
        assert wanted
        assert set(re.findall(r'"(\w+)"', asked)) == wanted


def test_words_are_really_read(cpu: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(2**62, (3 * 2**17 + 5,), generator=generator)
    expected = 2 * int(words.sum()) % 2**64
    for threads in (1, 3):
        assert cpu.sum_words(words.data_ptr(), len(words), 2, threads) == expected


def test_an_address_is_of_the_tensor_that_was_asked_for() -> None:
    x = torch.zeros(2, 4)
    assert _groups.address("x", x, torch.float32, (2, 4)) == x.data_ptr()
    for wrong in (x.double(), x[:1], x.mT.contiguous().mT, x.to("meta")):
        with pytest.raises(ShapeError, match=r"x: expected a contiguous torch.float32 tensor \[2"):
            _groups.address("x", wrong, torch.float32, (2, 4))


def test_without_the_extension_all_runs_on_the_reference_and_says_why() -> None:
    code = """
import sys
sys.modules["sixfold._cpu"] = None
import torch, sixfold
from sixfold.kernels._dispatch import OPERATIONS, implementation, missing_backends
for name in OPERATIONS:
    assert implementation(name, torch.device("cpu")).__name__.endswith("reference"), name
    print(missing_backends(name)["cpu"])
quantizer = sixfold.TurboQuantMSE(64, 4)
assert quantizer.decode(quantizer.encode(torch.randn(3, 64))).isfinite().all()
"""
    environment = {k: v for k, v in os.environ.items() if k != "SIXFOLD_BACKEND"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        assert "not part of this install" in line or "was not built" in line


def test_a_backend_without_its_extension_gives_the_extension_as_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from sixfold.kernels import rotate

    (tmp_path / "cpu.py").write_text("from sixfold import _absent")
    monkeypatch.setattr(rotate, "__path__", [str(tmp_path)])
    monkeypatch.setattr(_native, "extension", lambda: "there is no compiler")
    monkeypatch.delitem(sys.modules, "sixfold.kernels.rotate.cpu", raising=False)
    _dispatch._loaded.clear()
    try:
        assert _dispatch._load("rotate", "cpu") == "there is no compiler"
    finally:
        _dispatch._loaded.clear()
