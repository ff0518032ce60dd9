"""Write the measured numbers of docs/results/*.json into the README and docs.

No document states a number that no committed file holds: a test runs this and expects no change.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tools.quality_tables import evaluation_table, needle_table, recipe_table

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = (
    *("bits a value", "needles found", "perplexity", "mean KL, nats"),
    *("same top token", "bytes held", "smaller", "tokens/s"),
)


def demo_table(results: dict[str, Any]) -> str:
    """The README's table and the sentence under it."""
    lines = [_joined(COLUMNS), _joined(["---:"] * len(COLUMNS)), *map(_line, results["rows"])]
    windows, tokens = results["perplexity_windows"]
    machine = results["machine"]
    lines += [
        "",
        f"`sixfold demo` on {machine['processor']}, {machine['threads']} threads, torch "
        f"{machine['versions']['torch']}, the embedded model in bfloat16. Needles: five-digit "
        f"numbers hidden in {results['context']} tokens. Perplexity, KL (from the uncompressed "
        f"model, ± its standard error) and top token: {windows} windows of {tokens} tokens. "
        f"Bytes: everything a cache of {results['context']} tokens holds, windows and tables "
        "included; the share of those falls as contexts grow.",
    ]
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    plain = row["kl_standard_error"] is None and row["kl"] == 0
    error = row["kl_standard_error"]
    kl = f"{row['kl']:.4f}" + (f" ± {error:.4f}" if error is not None else "")
    cells = [
        f"{row['bits']:g}" + (" (uncompressed)" if plain else ""),
        f"{row['needles_exact']} of {row['needles_asked']}",
        f"{row['perplexity']:.2f}",
        "-" if plain else kl,
        "-" if plain else f"{row['top1_agreement']:.1%}",
        f"{row['nbytes'] / 1e6:.2f} MB",
        f"{row['compression_ratio']:.2f}×",
        f"{row['tokens_per_second']:.0f}",
    ]
    return _joined(cells)


def _joined(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def key_map_table(results: dict[str, Any]) -> str:
    """One row for every variant of the map, on the plain and on the hard model."""
    names = list(results["rows"][0]["kl"])
    lines = [
        _joined(["model", "scaled channels", *(f"{name} bits" for name in names)]),
        _joined(["---", "---", *["---:"] * len(names)]),
    ]
    for row in results["rows"]:
        cells = [f"{row['kl'][n]:.4f} ± {row['standard_error'][n]:.4f}" for n in names]
        lines.append(_joined([row["model"], row["variant"], *cells]))
    windows, tokens = results["windows"]
    lines += ["", f"{windows} windows of {tokens} tokens, the second half scored."]
    return "\n".join(lines)


def rotation_table(results: dict[str, Any]) -> str:
    """One row for every kind of vector, dimension and width; a column for every round."""
    lines = [
        _joined(["vectors", "dim", "bits", "1 round", "2 rounds", "3 rounds"]),
        _joined(["---", *["---:"] * 5]),
    ]
    for row in results["rows"]:
        pairs = zip(row["error"], row["standard_error"], strict=True)
        cells = [f"{mean:.2f} ± {error:.2f}" for mean, error in pairs]
        lines.append(_joined([row["vectors"], str(row["dim"]), f"{row['bits']:g}", *cells]))
    lines += [
        "",
        f"{results['seeds']} rotations a row, a vector each; ± one standard error.",
    ]
    return "\n".join(lines)


def benchmark_table(results: dict[str, Any]) -> str:
    """One line for every row of `python -m benchmarks.run --json`, losers included."""
    rows, machine = results["rows"], results["machine"]
    wanted = {name: any(row.get(name) is not None for row in rows) for name in OPTIONAL_COLUMNS}
    columns = ["", "tokens", "threads", "median (quartiles)"]
    columns += [title for name, title in OPTIONAL_COLUMNS.items() if wanted[name]]
    lines = [_joined(columns), _joined(["---", *["---:"] * (len(columns) - 1)])]
    for row in rows:
        name = " ".join(part for part in (row.get("model"), row["contender"]) if part)
        cells = [name, f"{row['tokens']:,}", str(row["threads"]), _time(row["seconds"])]
        cells += [_optional(name, row.get(name)) for name in OPTIONAL_COLUMNS if wanted[name]]
        lines.append(_joined(cells))
    reads = " and ".join(
        f"{speed / 1e9:.1f} GB/s with {count} threads"
        for count, speed in results["read_bandwidth"].items()
    )
    lines += [
        "",
        f"{machine['processor']}, {machine['isa'] or 'plain PyTorch'} kernels, torch "
        f"{machine['versions']['torch']}. It reads {reads}. Medians of {results['repeats']} calls "
        "in turn; error against float64.",
    ]
    return "\n".join(lines)


def kernels_table(results: dict[str, Any]) -> str:
    """One line for every kernel of `python -m tools.compile_kernels --json`."""
    rows = results["rows"]
    targets = list(rows[0]["targets"])
    lines = [
        _joined(["kernel", "warps", *targets]),
        _joined(["---", "---:", *["---"] * len(targets)]),
    ]
    for row in rows:
        cells = [_needs(row["targets"][target]) for target in targets]
        lines.append(_joined([row["kernel"], str(row["warps"]), *cells]))
    return "\n".join(
        [*lines, "", f"Registers a thread and shared memory; Triton {results['triton']}."]
    )


def _needs(needs: dict[str, Any]) -> str:
    parts = [str(needs["registers"]), f"{needs['shared_bytes'] / 1024:.1f} kB"]
    if needs["spills"]:
        parts.append(f"{needs['spills']} spills")
    return ", ".join([*parts, *(f"`{name}`" for name in needs["tensor_cores"])])


OPTIONAL_COLUMNS = {
    "error": "error",
    "nbytes": "bytes moved",
    "share_of_read_bandwidth": "of read bandwidth",
    "tokens_per_second": "tokens/s",
    "held_bytes": "cache holds",
}


def _optional(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name in ("nbytes", "held_bytes"):
        return f"{value / 1e6:.1f} MB"
    if name == "tokens_per_second":
        return f"{value:.2f}" if value < 10 else f"{value:.0f}"
    return f"{value:.1e}" if name == "error" else f"{value:.0%}"


def _time(seconds: dict[str, float]) -> str:
    unit, factor = ("ms", 1e3) if seconds["median"] >= 1e-3 else ("µs", 1e6)
    if seconds["median"] >= 1:
        unit, factor = "s", 1.0
    first, median, third = (factor * seconds[name] for name in ("first", "median", "third"))
    digits = 0 if median >= 100 else 1 if median >= 10 else 2
    return f"{median:.{digits}f} {unit} ({first:.{digits}f} to {third:.{digits}f})"


@dataclass(frozen=True)
class Block:
    """A part of a document that is written from a file of results."""

    document: Path
    results: Path
    name: str
    table: Callable[[dict[str, Any]], str]

    def rendered(self) -> str:
        """The document with the block replaced."""
        text = self.document.read_text(encoding="utf-8")
        begin, end = f"<!-- {self.name}:begin -->", f"<!-- {self.name}:end -->"
        before, found_begin, rest = text.partition(begin)
        _, found_end, after = rest.partition(end)
        if not found_begin or not found_end:
            raise SystemExit(f"{self.document} must hold the markers {begin!r} and {end!r}")
        results = json.loads(self.results.read_text(encoding="utf-8"))
        return f"{before}{begin}\n{self.table(results)}\n{end}{after}"


RESULTS = ROOT / "docs/results"
ROTATE = ROOT / "src/sixfold/kernels/rotate/README.md"
CPU_BLOCKS = tuple(
    Block(ROOT / "docs/cpu.md", RESULTS / f"cpu_{name}.json", f"cpu_{name}", benchmark_table)
    for name in ("attention", "lengths", "encode", "scores", "step", "generate", "prefill")
)
EVALUATION_BLOCKS = tuple(
    Block(ROOT / "docs/evaluation.md", RESULTS / f"{name}.json", name, evaluation_table)
    for name in ("eval_embedded", "eval_hard")
)
NEEDLE_BLOCKS = tuple(
    Block(ROOT / "docs/evaluation.md", RESULTS / f"{name}.json", name, needle_table)
    for name in ("needles_embedded", "needles_hard")
)
RECIPE_BLOCKS = tuple(
    Block(
        ROOT / "docs/recipe.md",
        RESULTS / "recipe.json",
        f"recipe_{study}",
        partial(recipe_table, study),
    )
    for study in (
        *("splits", "splits_windows", "spread", "first_tokens", "key_scales", "value_scales"),
        *("value_maps", "windows", "layers", "codes"),
    )
)
GPU_BLOCK = Block(ROOT / "docs/gpu.md", RESULTS / "gpu_kernels.json", "gpu_kernels", kernels_table)
BLOCKS = (
    Block(ROOT / "README.md", RESULTS / "demo.json", "demo", demo_table),
    Block(ROOT / "docs/key_map.md", RESULTS / "key_map.json", "key_map", key_map_table),
    Block(ROTATE, RESULTS / "rotation.json", "rotation", rotation_table),
    *(
        block
        for block in (*CPU_BLOCKS, *EVALUATION_BLOCKS, *NEEDLE_BLOCKS, *RECIPE_BLOCKS, GPU_BLOCK)
        if block.results.exists()
    ),
)


def main() -> None:
    """Rewrite every document in place."""
    for block in BLOCKS:
        block.document.write_text(block.rendered(), encoding="utf-8")


if __name__ == "__main__":
    main()
