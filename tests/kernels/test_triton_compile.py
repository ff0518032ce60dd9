"""Every Triton kernel compiles to machine code within its budget, without a GPU.

In a process of its own: what this one has imported runs in Triton's interpreter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sixfold.kernels._triton", exc_type=ImportError)

from tools.compile_kernels import SPILLS, TARGETS, problems, spills_allowed

ROOT = Path(__file__).resolve().parents[2]


def run(*options: str, interpret: bool = False) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TRITON_INTERPRET": "1" if interpret else "0"}
    command = [sys.executable, *options]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def assert_compiles(results: Path, *options: str) -> list[dict[str, Any]]:
    done = run("-m", "tools.compile_kernels", "--json", str(results), *options)
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(results.read_text(encoding="utf-8"))["rows"]
    assert rows
    for row in rows:
        assert row["targets"].keys() == {f"sm_{target}" for target in TARGETS}
        assert all(0 < needs["registers"] <= 255 for needs in row["targets"].values())
    return rows


def test_representative_kernels_compile_for_every_target(tmp_path: Path) -> None:
    rows = assert_compiles(tmp_path / "kernels.json", "--representative")
    expected = {
        "store_pages 4 and 2.5 bits, dim 128",
        "decode 4 bits, dim 128",
        "attend_pages 4 bits, dim 128, 8 rows",
        "attend_pages trellis 4 and 3 bits, dim 128, 8 rows",
    }
    assert expected <= {row["kernel"] for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kernel",
    [
        *("rotate", "encode", "encode_pages", "store_pages", "decode", "decode_pages", "scores"),
        *("attend_pages", "merge_ranges", "path_vectors", "search"),
    ],
)
def test_all_kernels_compile_for_every_target(kernel: str, tmp_path: Path) -> None:
    assert_compiles(tmp_path / "kernels.json", "--only", f"{kernel} ")


GOOD = {
    "kernel": "encode",
    "target": "sm_90",
    "registers": 255,
    "spills": 0,
    "inexact": [],
    "tensor_cores": [],
    "expects_tensor_cores": False,
}


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"registers": 256}, "256 registers, at most 255"),
        ({"spills": 1}, "1 loads and stores of spilled registers, at most 0"),
        ({"inexact": ["fma.rn.f32"]}, "separately rounded operations, has fma.rn.f32"),
        ({"expects_tensor_cores": True}, "promises tensor cores, has none"),
    ],
)
def test_what_is_beyond_the_budget_is_named(bad: dict[str, Any], says: str) -> None:
    assert problems(GOOD) == []
    (problem,) = problems(GOOD | bad)
    assert problem == f"encode for sm_90: {problem.partition(': ')[2]}"
    assert says in problem


def test_old_compilers_may_spill_more_only_where_it_is_written() -> None:
    assert spills_allowed("3.9.0") == spills_allowed("3.10.1") == SPILLS
    row = GOOD | {"kernel": "attend_pages 3 bits, dim 64, 8 rows, mask i1", "spills": 2}
    assert problems(row)
    assert not problems(row, spills_allowed("3.8.0"))
    assert problems(row | {"spills": 3}, spills_allowed("3.8.0"))


def test_fused_products_are_found() -> None:
    code = (
        "from tools.compile_kernels import compiled;"
        "from tests.kernels.triton_variants_vectors import rotate;"
        "print(compiled(rotate(32), 90, fuse=True)['inexact'])"
    )
    done = run("-c", code)
    assert "fma.rn.f32" in done.stdout, done.stderr


def test_interpreted_kernels_are_refused() -> None:
    done = run("-m", "tools.compile_kernels", interpret=True)
    assert done.returncode == 1
    assert "unset TRITON_INTERPRET" in done.stderr
