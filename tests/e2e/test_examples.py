"""The programs in examples/ run, on the model inside the package, and print what they say."""

import json
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
PROGRAMS = sorted(path for path in EXAMPLES.glob("*.py") if path.stem != "shared")
MOST_LINES = 60

pytestmark = pytest.mark.usefixtures("unhooked")


def run(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str
) -> str:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [path.name, *options])
    runpy.run_path(str(path), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_examples_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_a_chat_goes_on_from_the_saved_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, saved = EXAMPLES / "chat_with_a_document.py", tmp_path / "saved.sixfold"
    options = ("--saved", str(saved), "--question", "Who?", "--question", "Where?")
    first = run(path, monkeypatch, capsys, *options)
    assert saved.is_file()
    before = saved.read_bytes()
    assert run(path, monkeypatch, capsys, *options) == first
    assert saved.read_bytes() == before
    assert first.startswith("TurboQuantCache(4 bits")


def test_a_chat_about_another_text_does_not_go_on_from_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        text = tmp_path / f"{name}.txt"
        text.write_text(f"The {name} was red. " * 20, encoding="utf-8")
        options = ("--file", str(text), "--question", "Who?")
        run(EXAMPLES / "chat_with_a_document.py", monkeypatch, capsys, *options)
    assert len([*tmp_path.glob("*.sixfold")]) == 2


def test_forks_answer_from_one_prefix(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = run(EXAMPLES / "one_prefix_many_questions.py", monkeypatch, capsys)
    assert said.count("tokens in this fork: ") == 3


def test_a_filled_cache_says_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = EXAMPLES / "compress_a_filled_cache.py"
    _, exact, found = run(path, monkeypatch, capsys, "--bits", "8").splitlines()
    words = [[cell.split()[0] for cell in line.split("[")[1].split(",")] for line in (exact, found)]
    assert words[0] == words[1]


def test_a_batch_answers_what_each_request_alone_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = EXAMPLES / "serve_batches.py"
    together = run(path, monkeypatch, capsys, "--batch", "3")
    assert run(path, monkeypatch, capsys, "--batch", "1") == together
    lengths = {len(line) for line in together.splitlines()}
    assert len(lengths) > 2


def test_the_notebook_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    notebook = json.loads((EXAMPLES / "what_quantization_does.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    monkeypatch.setattr(pyplot, "show", lambda: None)
    space: dict[str, object] = {}
    for cell in cells:
        exec("".join(cell["source"]), space)
    pictures = len(pyplot.get_fignums())
    pyplot.close("all")
    assert pictures == 4
    # The text that is shown with it is what it says.
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert sum(output["output_type"] == "display_data" for output in outputs) == pictures
    shown = [line for output in outputs for line in output.get("text", ())]
    said = capsys.readouterr().out.splitlines(keepends=True)
    assert [line.split(":")[0] for line in said] == [line.split(":")[0] for line in shown]


def test_search_finds_a_sentence_by_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The cat slept. A storm rose over the sea. Bread was dear that year.")
    said = run(
        EXAMPLES / "search_a_text.py", monkeypatch, capsys, "a storm at sea", "--file", str(text)
    )
    assert said.splitlines()[1].endswith("A storm rose over the sea.")
