"""Measurements that are stopped and go on: nothing twice, and the result is the same."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import Cache, PreTrainedModel
from typer.testing import CliRunner, Result

from sixfold.cli.app import app
from sixfold.errors import FormatError, SixfoldError
from sixfold.eval.caches import MakeCache, compressed, uncompressed
from sixfold.eval.checkpoint import Checkpoint
from sixfold.eval.embedded import haystack
from sixfold.eval.longbench import measure_longbench
from sixfold.eval.niah import retrieve
from sixfold.eval.perplexity import compare_caches, windows_of
from sixfold.eval.ruler import measure_retrieval
from tests.tiny import tiny_model, tiny_tokenizer

QUESTION = {"of": "a test", "bits": [4, 2.5]}


def measured(value: Any) -> Callable[[], Any]:
    return lambda: value


def never() -> Any:
    raise AssertionError("it was measured before")


def test_what_was_found_is_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    first = Checkpoint(path, QUESTION)
    found = {"kl": [0.1, 1e-300, -0.0], "exact": [True, None]}
    assert first.once("one", measured(found)) == found
    again = Checkpoint(path, QUESTION)
    assert again.once("one", never) == found
    assert ("one" in again, "two" in again) == (True, False)
    assert again.once("two", measured(2)) == 2
    assert Checkpoint(path, QUESTION).once("two", never) == 2


def test_without_a_file_a_part_is_measured_once() -> None:
    checkpoint = Checkpoint()
    assert checkpoint.once("one", measured(1)) == 1
    assert checkpoint.once("one", never) == 1


def test_an_exception_leaves_no_trace(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "x", QUESTION)
    with pytest.raises(AssertionError):
        checkpoint.once("one", never)
    assert Checkpoint(tmp_path / "x", QUESTION).once("one", measured(1)) == 1


@pytest.mark.parametrize("lost", range(1, 20))
def test_a_line_that_was_cut_off_is_measured_again(lost: int, tmp_path: Path) -> None:
    path = tmp_path / "x"
    checkpoint = Checkpoint(path, QUESTION)
    checkpoint.once("one", measured(1))
    before = path.stat().st_size
    checkpoint.once("two", measured("a long one, with ünicode"))
    data = path.read_bytes()
    path.write_bytes(data[:-lost])
    again = Checkpoint(path, QUESTION)
    assert again.once("one", never) == 1
    assert path.stat().st_size == before
    assert again.once("two", measured("a long one, with ünicode")) == "a long one, with ünicode"
    assert path.read_bytes() == data


def test_another_measurement_is_refused(tmp_path: Path) -> None:
    Checkpoint(tmp_path / "x", QUESTION)
    with pytest.raises(SixfoldError, match=r"another measurement: bits \[4, 2.5\] \(here \[4\]\)"):
        Checkpoint(tmp_path / "x", {**QUESTION, "bits": [4]})
    with pytest.raises(SixfoldError, match=r"seed None \(here 3\)"):
        Checkpoint(tmp_path / "x", {**QUESTION, "seed": 3})


@pytest.mark.parametrize(
    "text", ["a novel\n", "[1, 2]\n", '{"kind": "other"}\n', "null\n", "\n", "no line", "\xff\n"]
)
def test_a_foreign_file_is_refused_and_left_alone(text: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_text(text, encoding="latin-1")
    with pytest.raises(FormatError, match="no checkpoint"):
        Checkpoint(tmp_path / "x", QUESTION)
    assert (tmp_path / "x").read_text(encoding="latin-1") == text


@pytest.mark.parametrize("line", ["3", "[1, 2]", '["a"]', '{"a": 1}', "x"])
def test_a_damaged_line_is_refused(line: str, tmp_path: Path) -> None:
    Checkpoint(tmp_path / "x", QUESTION).once("one", measured(1))
    with (tmp_path / "x").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(FormatError, match="damaged"):
        Checkpoint(tmp_path / "x", QUESTION)


# ---------------------------------------------------------------- every measurement


def perplexity(caches: dict[str, MakeCache], checkpoint: Checkpoint | None) -> Any:
    windows = windows_of(tiny_tokenizer(), haystack(), 200, 3)
    return compare_caches(tiny_model(), windows, caches, prefill=100, checkpoint=checkpoint)


def needles(caches: dict[str, MakeCache], checkpoint: Checkpoint | None) -> Any:
    options: dict[str, Any] = {"lengths": (400, 300), "depths": (0, 1), "checkpoint": checkpoint}
    return retrieve(tiny_model(), tiny_tokenizer(), haystack(), caches, **options)


def documents(caches: dict[str, MakeCache], checkpoint: Checkpoint | None) -> Any:
    options: dict[str, Any] = {"tokens": 400, "documents": 2, "checkpoint": checkpoint}
    return measure_retrieval(tiny_model(), tiny_tokenizer(), haystack(), caches, **options)


def answers(caches: dict[str, MakeCache], checkpoint: Checkpoint | None) -> Any:
    text = haystack()
    rows = [
        {"context": text[i : i + 300], "input": "Who?", "answers": ["He"], "length": 50}
        for i in (0, 500)
    ]
    data, model = {"qasper": rows}, tiny_model()
    options: dict[str, Any] = {"max_tokens": 300, "checkpoint": checkpoint}
    return measure_longbench(model, tiny_tokenizer(), data, caches, **options)


@pytest.mark.parametrize("measure", [perplexity, needles, documents, answers])
@pytest.mark.parametrize("stop", [2, 3])
def test_what_was_stopped_ends_alike(measure: Any, stop: int, tmp_path: Path) -> None:
    caches = {"16": uncompressed, "4": compressed(4)}
    made: list[str] = []

    def counted(name: str, stop: int | None) -> MakeCache:
        def make(model: PreTrainedModel) -> Cache:
            if len(made) == stop:
                raise KeyboardInterrupt
            made.append(name)
            return caches[name](model)

        return make

    expected = measure({name: counted(name, None) for name in caches}, None)
    whole = len(made)
    made.clear()
    with pytest.raises(KeyboardInterrupt):
        measure({name: counted(name, stop) for name in caches}, Checkpoint(tmp_path / "x", {}))
    found = measure({name: counted(name, None) for name in caches}, Checkpoint(tmp_path / "x", {}))
    assert found == expected
    # At most what was in hand when it was stopped is made again.
    assert len(made) <= whole + 1
    made.clear()
    again = measure({name: counted(name, 0) for name in caches}, Checkpoint(tmp_path / "x", {}))
    assert again == expected


# ---------------------------------------------------------------- commands


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments], env={"COLUMNS": "200"})


COMMANDS = {
    "perplexity": ("--window", 128, "--windows", 2),
    "niah": ("--lengths", 300, "--documents", 1, "--depths", 0.5),
    "retrieval": ("--length", 300, "--documents", 1),
    "sensitivity": ("--window", 64, "--windows", 1),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_go_on(
    command: str, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, first, second = (tmp_path / name for name in ("kept", "first.json", "second.json"))
    asked = ("eval", command, model_dir, *COMMANDS[command], "--bits", 4, "--resume", kept)
    done = run(*asked, "--json", first)
    assert done.exit_code == 0, done.output
    monkeypatch.setattr(Checkpoint, "_write", lambda self, value: never())
    done = run(*asked, "--json", second)
    assert done.exit_code == 0, done.output
    rows = [json.loads(path.read_text())["rows"] for path in (first, second)]
    assert rows[0] == rows[1]
    other = run(*asked, "--bits", 3)
    assert other.exit_code != 0
    assert "another measurement: bits '4' (here '3')" in other.output.replace("\n", " ")
