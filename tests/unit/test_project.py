"""The project as a whole: what imports what, and that the README states measured numbers."""

import inspect
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Unpack

import grimp
import pytest

import sixfold
from sixfold.cache import CachePolicy, LayerShape, cache_nbytes, uncompressed_nbytes
from sixfold.integrations.transformers.options import CacheOptions
from tools import render_results
from tools.architecture_tables import OUTCOMES
from tools.real_models import collect

ROOT = Path(__file__).resolve().parents[2]


def imported_modules() -> set[str]:
    command = [sys.executable, "-X", "importtime", "-c", "import sixfold"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


def test_import_loads_no_host_framework() -> None:
    modules = imported_modules()
    assert {"torch", "sixfold.quantizers.mse"} <= modules
    roots = {name.partition(".")[0] for name in modules}
    assert roots.isdisjoint({"transformers", "triton", "vllm", "typer", "rich", "matplotlib"})


def test_whatever_is_in_eval_serves_a_command() -> None:
    graph = grimp.build_graph("sixfold", cache_dir=None)
    served = graph.find_upstream_modules("sixfold.cli.app")
    assert {name for name in graph.find_descendants("sixfold.eval") if name not in served} == set()


def test_one_harness_times_things() -> None:
    clock = re.compile(r"\b(perf_counter|timeit|do_bench|statistics\.(median|quantiles))\b")
    folders = ROOT / "src/sixfold/eval", ROOT / "benchmarks"
    files = [path for folder in folders for path in folder.rglob("*.py")]
    # Where the harness cannot go: Triton's events on a GPU, another project's interpreter, servers
    # that vLLM's own client times, and indexes whose threads must not meet in one process.
    assert {path.name for path in files if clock.search(path.read_text(encoding="utf-8"))} == {
        *("timing.py", "gpu_cases.py", "vllm_server.py", "vllm_serving.py", "vllm_paired.py"),
        *("vector_index.py", "vector_scale.py"),
    }


def test_every_public_name_exists() -> None:
    for name in sixfold.__all__:
        assert getattr(sixfold, name) is not None
    assert sixfold.TurboQuantCache.__module__.startswith("sixfold.integrations.transformers")
    name = "TurboQuant"
    with pytest.raises(AttributeError, match="'sixfold' has no attribute 'TurboQuant'"):
        getattr(sixfold, name)


def test_editors_complete_the_options_of_a_cache() -> None:
    """`for_model` and `from_cache` took anything; now they name what the constructor takes."""
    taken = inspect.signature(sixfold.TurboQuantCache).parameters
    named = {name for name, one in taken.items() if one.kind is one.KEYWORD_ONLY}
    assert set(CacheOptions.__annotations__) == named
    for method in (sixfold.TurboQuantCache.for_model, sixfold.TurboQuantCache.from_cache):
        options = inspect.signature(inspect.unwrap(method)).parameters["options"]
        assert options.annotation == Unpack[CacheOptions]


def test_dir_lists_what_users_type_and_nothing_else() -> None:
    assert dir(sixfold) == sorted(sixfold.__all__)
    assert "TurboQuantCache" in dir(sixfold)


def test_without_transformers_the_cache_says_what_to_install() -> None:
    code = "import sys; sys.modules['transformers'] = None; from sixfold import TurboQuantCache"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "pip install 'sixfold[transformers]'" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("block", render_results.BLOCKS, ids=lambda block: block.name)
def test_documents_state_the_committed_results(block: render_results.Block) -> None:
    assert block.rendered() == block.document.read_text(encoding="utf-8")


@pytest.mark.parametrize("block", render_results.BLOCKS, ids=lambda block: block.name)
def test_rendering_replaces_the_block_and_nothing_else(
    block: render_results.Block, tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    begin, end = f"<!-- {block.name}:begin -->", f"<!-- {block.name}:end -->"
    page.write_text(f"before\n{begin}\nSTALE\n{end}\nafter\n", encoding="utf-8")
    once = replace(block, document=page).rendered()
    rows = block.data()["rows"]
    assert once.startswith(f"before\n{begin}\n| ")
    assert once.endswith(f"\n{end}\nafter\n")
    assert "STALE" not in once
    # Variants of a kernel, sizes of chunks and models share a line, and an aim is one of few rows.
    shared = ("gpu_kernels", "vllm_kl", "readme_")
    if block.name.startswith(shared) or block.name.endswith("_aim"):
        assert 2 < once.count("\n|") < len(rows)
    elif block.name.startswith("key_map_beginnings"):  # a column a model
        assert once.count("\n|") == len({row["fitted to"] for row in rows}) + 2
    elif block.name == "real_models":  # a column a model
        assert once.count("\n|") == len({row["cache"] for row in rows}) + 2
    elif block.name == "real_texts":  # likewise
        assert once.count("\n|") == len({(row["text"], row["cache"]) for row in rows}) + 2
    elif block.name == "real_speed_longest":  # one number of tokens a model
        assert once.count("\n|") == len({(row["model"], row["contender"]) for row in rows}) + 2
    elif block.name == "trellis_speed":  # a column an operation
        assert once.count("\n|") == len(rows) / len({row["contender"] for row in rows}) + 2
    elif block.name == "architectures":  # three tables, the first one of every outcome
        assert once.count("\n|") == len(rows) + len(OUTCOMES) + 3 * 2
    elif block.name == "vector_scale":  # a row a size, and one for each number of lists
        assert once.count("\n|") == sum(1 + len(row["probed"]) for row in rows) + 2
    elif block.name == "vector_lists":
        assert once.count("\n|") == len(block.data()["lists"]["rows"]) + 2
    elif block.name == "transformers_tests":  # a column a setting and mode, then three sums
        assert once.count("\n|") == len({row["architecture"] for row in rows}) + 3 + 2
    else:
        assert once.count("\n|") == len(rows) + 2
    page.write_text("no block", encoding="utf-8")
    with pytest.raises(SystemExit, match="must hold the markers"):
        replace(block, document=page).rendered()


def test_the_oldest_environment_has_the_declared_minimums() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    declared = [*project["dependencies"], *extras["transformers"], *extras["cli"]]
    minimums = {
        name: version
        for one in declared
        if not one.startswith("sixfold")
        for name, version in re.findall(r"^([\w-]+)>=([\d.]+)", one)
    }
    assert len(minimums) == len([one for one in declared if not one.startswith("sixfold")])
    lines = (ROOT / "requirements-oldest.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert pins.keys() == minimums.keys()
    for name, version in minimums.items():
        assert pins[name] == version or re.fullmatch(rf"{re.escape(version)}(\.0)+", pins[name])


def test_readme_opens_with_true_sizes() -> None:
    """Llama 3.1 8B: 32 layers, 8 KV heads of 128."""
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    sentence = r"At ([\d,]+) tokens .*? takes ([\d.]+) GB.*? in ([\d.]+) GB"
    (tokens, plain, held), *_ = re.findall(sentence, text)
    shapes = [LayerShape(8, 128, 128, policy=CachePolicy(key_bits=4, value_bits=4))] * 32
    count = int(tokens.replace(",", ""))
    assert plain == f"{uncompressed_nbytes(shapes, tokens=count) / 1e9:.1f}"
    assert held == f"{cache_nbytes(shapes, tokens=count) / 1e9:.1f}"


def test_results_name_no_machine_but_its_processor() -> None:
    text = (ROOT / "docs/results/demo.json").read_text(encoding="utf-8")
    assert not re.search(r"/(home|root|work|tmp|opt)\b", text)


def test_models_measured_unlike_share_no_table() -> None:
    one = {"model": "a", "dtype": "float32", "machine": {}, "asked": {"window": 768}, "rows": {}}
    with pytest.raises(SystemExit, match="b was measured unlike a"):
        collect([one, {**one, "model": "b", "asked": {"window": 512}}])
