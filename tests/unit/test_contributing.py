"""What CONTRIBUTING and the workflows tell one to type exists."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
TEXTS = [ROOT / "CONTRIBUTING.md", ROOT / "README.md", ROOT / ".ci/run", *WORKFLOWS]
# Written by a target, or stands for many names.
MADE = re.compile(r"[*<>{}$ ]|^\.venv|^site/$")


def targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    return {*" ".join(phony).split(), "test-oldest", "test-newest"}


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.name)
def test_every_target_named_exists(text: Path) -> None:
    words = re.sub(r"\$\{\{ matrix\.versions \}\}", "oldest", text.read_text(encoding="utf-8"))
    named = re.findall(r"(?:^|`|run: )make\s([a-z-]+)", words, re.MULTILINE)
    assert set(named) <= targets()


def test_every_path_named_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    quoted = {one for one in re.findall(r"`([\w./-]+/[\w./-]*)`", text) if not MADE.search(one)}
    missing = {
        one
        for one in quoted
        if not any((folder / one).exists() for folder in (ROOT, ROOT / "src", ROOT / "src/sixfold"))
    }
    assert missing == set()
    assert len(quoted) > 10


def test_every_module_run_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    modules = set(re.findall(r"python -m ((?:tools|benchmarks|tests)[\w.]*)", text))
    assert len(modules) > 5
    assert {name for name in modules if importlib.util.find_spec(name) is None} == set()


def test_releases_build_what_pyproject_says() -> None:
    """`release.yml` counts the wheels; `wheels.yml` has a runner for each."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    built = re.findall(r'"(cp311-\w+)"', project)
    release = (ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8")
    assert f'dist/*.whl | wc -l)" = {len(built)}' in release
    wheels = (ROOT / ".github/workflows/wheels.yml").read_text(encoding="utf-8")
    for runners in re.findall(r"runner: \[(.*)\]", wheels):
        assert len(runners.split(",")) == len(built)
