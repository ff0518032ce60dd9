"""`sixfold index`: from a file of vectors to their neighbours."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from sixfold import Index
from sixfold.cli.app import app

pytestmark = pytest.mark.usefixtures("unhooked")


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["index", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    x = np.random.default_rng(0).normal(size=(500, 24)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "q.npy", x[:25].astype(np.float64))
    (tmp_path / "ids.txt").write_text("".join(f"name {i}\n" for i in range(500)), encoding="utf-8")
    return tmp_path


def test_build_search_info(folder: Path) -> None:
    index = folder / "x.sixfold"
    built = run("build", folder / "x.npy", index)
    assert "500 vectors of 24 coordinates at 4 bits" in " ".join(built.split())
    found = json.loads(run("search", index, folder / "q.npy", "-k", 3, "--json", "-"))
    assert [ids[0] for ids in found["ids"]] == list(range(25))
    assert np.shape(found["scores"]) == (25, 3)
    text = run("search", index, folder / "q.npy", "-k", 1)
    assert "first 20 of 25" in " ".join(text.split())
    described = json.loads(run("info", index, "--json", "-"))
    assert (described["vectors"], described["metric"]) == (500, "cosine")
    assert described["file_bytes"] == index.stat().st_size


def test_ids_and_a_metric(folder: Path) -> None:
    index = folder / "x.sixfold"
    options = "--bits", 8, "--metric", "l2", "--ids", folder / "ids.txt"
    run("build", folder / "x.npy", index, *options)
    assert Index.load(index).metric == "l2"
    found = json.loads(run("search", index, folder / "q.npy", "-k", 600, "--json", "-"))
    assert found["ids"][3][0] == "name 3"
    assert found["ids"][3][599] is None
    assert found["scores"][3][599] is None


def test_lists(folder: Path) -> None:
    index = folder / "x.sixfold"
    assert "in 10 lists" in " ".join(run("build", folder / "x.npy", index, "--lists", 10).split())
    found = json.loads(run("search", index, folder / "q.npy", "--probes", 1, "--json", "-"))
    assert [ids[0] for ids in found["ids"]] == list(range(25))
    assert json.loads(run("info", index, "--json", "-"))["lists"] == 10


def test_what_is_no_file_of_vectors(folder: Path) -> None:
    (folder / "text.npy").write_text("no numbers", encoding="utf-8")
    np.save(folder / "flat.npy", np.zeros(5))
    np.savez(folder / "several.npz", a=np.zeros(5))
    objects = np.array([["a"], [{}]], dtype=object)
    np.save(folder / "objects.npy", objects, allow_pickle=True)
    for name in ("text.npy", "flat.npy", "several.npz", "objects.npy", "missing.npy"):
        result = CliRunner().invoke(
            app, ["index", "build", str(folder / name), str(folder / "out")]
        )
        assert result.exit_code == 2, name
        assert not (folder / "out").exists()
    for options in (["--bits", "5"], ["--metric", "dot"], ["--ids", str(folder / "text.npy")]):
        given = ["index", "build", str(folder / "x.npy"), str(folder / "out"), *options]
        assert CliRunner().invoke(app, given).exit_code == 2
