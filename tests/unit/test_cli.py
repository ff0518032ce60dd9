"""The command line as a whole: help, errors in one line, exit codes, what it needs."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import sixfold
from sixfold.cli.app import app
from sixfold.cli.common import parse_bits, parse_list, parse_size
from sixfold.cli.render import Output, progress_bar, waiting
from sixfold.errors import SixfoldError

COMMANDS = (
    *(["demo"], ["generate"], ["plan"], ["bench"], ["doctor"]),
    *(["eval", "distortion"], ["eval", "perplexity"], ["eval", "niah"]),
)

MAIN = "from sixfold.cli import main; main()"
NUMBERS = ("--layers", "2", "--kv-heads", "2", "--head-dim", "8")


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself_and_speaks_json(command: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert "--json" in result.output


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.output == f"sixfold {sixfold.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "/nowhere", "--prompt", "x"], "there is no such file or directory"),
        (["generate", "embedded"], "by --prompt, by --file, or by both"),
        (["generate", "embedded", "--prompt", " "], "the prompt is empty"),
        (["demo", "--bits", "9"], "bits must be one of"),
        (["demo", "--bits", "four"], "--bits: expected numbers separated by commas"),
        (["eval", "perplexity", "/nowhere"], "there is no such file or directory"),
        (["eval", "distortion", "--dims", ","], "--dims: expected at least one number"),
        (["eval", "niah", "--plot", "out.doc"], "its name must end in .png"),
        (["plan"], "give either MODEL, or all of"),
        (["plan", *NUMBERS, "--bits", "16"], "16 is the uncompressed cache, which is always shown"),
        (["plan", *NUMBERS, "--bits", "3.7"], "one of 1, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, got 3.7"),
        (["plan", *NUMBERS, "--json", "/proc/no.json"], "cannot write /proc/no.json: "),
        (
            ["generate", "embedded", "--prompt", "x", "--device", "tpu"],
            "device 'tpu' cannot be used",
        ),
        (["plan", *NUMBERS, "--memory", "big"], "expected a size such as 80GB"),
        (["plan", *NUMBERS, "--memory", "8"], "did you mean 8GB?"),
        (["demo", "--file", "/nowhere"], "No such file or directory: '/nowhere'"),
        (["doctor", "--json", "/nowhere/out.json"], "the folder /nowhere does not exist"),
        (["bench", "--op", "sort", "--tokens", "64"], "expected operations among"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("sixfold: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    result = CliRunner().invoke(app, ["demo", "--file", str(tmp_path / "binary")])
    assert (result.exit_code, "is not UTF-8 text" in result.stderr) == (2, True)


def test_a_measurement_in_a_pipe_says_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0, 10, 31, 40, 62])
    monkeypatch.setattr("sixfold.cli.render.monotonic", lambda: next(clock))
    with progress_bar("reading text") as progress:
        for step, name in enumerate(["uncompressed", "4 bits", "uncompressed", "4 bits"], 1):
            progress(step, 1000, name)
    assert capsys.readouterr().err.splitlines() == [
        "reading text: 2 of 1,000 steps in 0:00:31, the last of 4 bits; 4:17:49 left",
        "reading text: 4 of 1,000 steps in 0:01:02, the last of 4 bits; 4:17:18 left",
    ]


def test_an_interrupted_command_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sixfold.cli.plan.parse_size", interrupt)
    result = CliRunner().invoke(app, ["plan", *NUMBERS])
    assert (result.exit_code, result.stderr) == (130, "sixfold: interrupted\n")


def test_errors_of_the_system_show_no_numbers() -> None:
    result = CliRunner().invoke(app, ["demo", "--file", "/nowhere"])
    assert result.stderr == "sixfold: No such file or directory: '/nowhere'\n"


def test_an_output_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    """It is tried before the work, which fails here."""
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text("{}")
    for path in (old, new):
        CliRunner().invoke(app, ["plan", "--json", str(path)])
    assert (old.read_text(), new.exists()) == ("{}", False)


def test_a_reader_that_has_enough_ends_a_command_without_a_word() -> None:
    command = f"import sys; sys.argv[0] = 'sixfold'; {MAIN}"
    arguments = [sys.executable, "-c", command, "plan", *NUMBERS]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(arguments, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_what_is_waited_for_is_said_in_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    with waiting("reading 3 tokens") as stop:
        stop()
    assert capsys.readouterr().err == ""
    # Which rich takes for a terminal as well.
    monkeypatch.setenv("FORCE_COLOR", "1")
    with waiting("reading 3 tokens") as stop:
        stop()
    assert "reading 3 tokens" in capsys.readouterr().err


def test_sizes() -> None:
    assert parse_size("80GB") == 80 * 10**9
    assert parse_size("1.5 GiB") == 3 * 2**29
    assert parse_size("512mib") == 2**29
    assert parse_size("7") == 7
    for wrong in ("", "GB", "-1GB", "80 gigs"):
        with pytest.raises(SixfoldError, match="expected a size such as 80GB"):
            parse_size(wrong)


def test_a_picture_without_matplotlib_is_refused_before_the_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name)
    )
    picture = str(tmp_path / "out.png")
    result = CliRunner().invoke(app, ["eval", "distortion", "--plot", picture])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "without matplotlib: pip install 'sixfold[cli]'" in result.stderr


def test_numbers_are_never_cut(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A terminal narrower than the table wraps lines; rich would have written dots."""
    monkeypatch.setenv("COLUMNS", "20")
    Output(None).table("a title", ["cache", "a long column"], [["uncompressed", "1,234,567,890"]])
    out = capsys.readouterr().out
    assert "uncompressed" in out
    assert "1,234,567,890" in out
    assert "…" not in out


def test_lists() -> None:
    assert parse_bits("4, 3.5,2") == [4, 3.5, 2]
    assert parse_list("1,2,", int, "--dims") == [1, 2]


def test_without_its_packages_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['typer'] = None; " + MAIN
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "sixfold: the command line needs typer: pip install 'sixfold[cli]'\n"
