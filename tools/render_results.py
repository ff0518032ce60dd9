"""Write the measured numbers of docs/results/*.json into the README and docs.

No document states a number that no committed file holds: a test runs this and expects no change.
"""

import json
from collections.abc import Callable
from typing import Any

from benchmarks import needles
from sixfold.eval.estimate import half_width
from tools import long_context_tables, reproduction_tables, vllm_tables
from tools.architecture_tables import architecture_table, transformers_tests_table
from tools.blocks import RESULTS, ROOT, Block, table_row
from tools.index_tables import (
    vector_index_table,
    vector_kinds_table,
    vector_lists_table,
    vector_scale_table,
)
from tools.quality_tables import (
    codes_table,
    evaluation_table,
    evaluation_targets,
    needle_table,
    needle_targets,
    real_needles_table,
    recipe_table,
)
from tools.readme_tables import demo_table, speed_table
from tools.real_models import real_models_table
from tools.real_speed import longest_table, real_speed_table
from tools.real_texts import real_texts_table

OVER_WINDOWS = "± half a 95 % interval over windows"


def _kl_table(
    results: dict[str, Any],
    names: list[str],
    numbers: list[str],
    cells: Callable[[dict[str, Any]], list[str]],
    scored: str = "the second half scored",
) -> str:
    """Rows of mean KL by width, after columns of `names` and of `numbers` that `cells` fills."""
    widths = list(results["rows"][0]["kl"])
    lines = [
        table_row([*names, *numbers, *(f"{width} bits" for width in widths)]),
        table_row(["---"] * len(names) + ["---:"] * (len(numbers) + len(widths))),
    ]
    windows, tokens = results["windows"]
    for row in results["rows"]:
        kl = [_with_error(row["kl"][w], row["standard_error"][w], windows) for w in widths]
        lines.append(table_row([*cells(row), *kl]))
    lines += ["", f"{windows} windows of {tokens} tokens, {scored}; {OVER_WINDOWS}."]
    return "\n".join(lines)


def _with_error(mean: float, standard_error: float, windows: int) -> str:
    return f"{mean:.4f} ± {half_width(standard_error, windows):.4f}"


def key_map_table(results: dict[str, Any]) -> str:
    """One row for every variant of the map, on the plain and on the hard model."""
    names = ["model", "scaled channels"]
    return _kl_table(results, names, [], lambda row: [row["model"], row["variant"]])


def key_map_chunks_table(results: dict[str, Any]) -> str:
    """One row for every way a prompt comes in and every map, on every model."""

    def cells(row: dict[str, Any]) -> list[str]:
        chunk = row["chunk"]
        prompt = {0: "one piece", 1: "token by token"}.get(chunk, f"chunks of {chunk}")
        return [row["model"], prompt, row["map"], f"{row['differing']:.2%}"]

    return _kl_table(results, ["model", "prompt", "map"], ["codes unlike"], cells)


def key_map_unseen_table(results: dict[str, Any]) -> str:
    """One row for every model and what its queries are taken to be."""

    def cells(row: dict[str, Any]) -> list[str]:
        return [row["model"], row["queries"], f"{row['logit_error']:.2f}"]

    scored = "the last third scored in chunks of 64"
    return _kl_table(results, ["model", "queries"], ["logit error"], cells, scored)


def key_map_beginnings_table(results: dict[str, Any]) -> str:
    """One row for every number of tokens that maps were fitted to; a column for every model."""
    rows, (windows, tokens) = results["rows"], results["windows"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = [table_row(["maps fitted to", *models]), table_row(["---", *["---:"] * len(models)])]
    for fitted in dict.fromkeys(row["fitted to"] for row in rows):
        found = {row["model"]: row for row in rows if row["fitted to"] == fitted}
        cells = [_with_error(found[m]["kl"], found[m]["standard_error"], windows) for m in models]
        what = f"{int(fitted):,} tokens of another" if fitted.isdigit() else fitted
        lines.append(table_row([what, *cells]))
    lines += ["", f"{windows} windows of {tokens} tokens, the second half scored; {OVER_WINDOWS}."]
    return "\n".join(lines)


def rotation_table(results: dict[str, Any]) -> str:
    """One row for every kind of vector, dimension and width; a column for every round."""
    lines = [
        table_row(["vectors", "dim", "bits", "1 round", "2 rounds", "3 rounds"]),
        table_row(["---", *["---:"] * 5]),
    ]
    for row in results["rows"]:
        pairs = zip(row["error"], row["standard_error"], strict=True)
        cells = [f"{mean:.2f} ± {error:.2f}" for mean, error in pairs]
        lines.append(table_row([row["vectors"], str(row["dim"]), f"{row['bits']:g}", *cells]))
    lines += [
        "",
        f"{results['seeds']} rotations a row, a vector each; ± one standard error.",
    ]
    return "\n".join(lines)


def trellis_choices_table(results: dict[str, Any]) -> str:
    """One row for every codebook and seam, a column for every width."""
    widths = list(results["rows"][0]["error"])
    lines = [table_row(["bits", *widths]), table_row(["---", *["---:"] * len(widths)])]
    for row in results["rows"]:
        lines.append(table_row([row["variant"], *(f"{row['error'][b]:.5f}" for b in widths)]))
    return "\n".join([*lines, "", f"{results['vectors']} Gaussian vectors."])


def trellis_distortion_table(results: dict[str, Any]) -> str:
    """One row for every dimension and width: the scalar code, the trellises, Shannon's bound."""
    codes = list(results["rows"][0]["error"])
    names = [f"{code} states" if code.isdigit() else f"`{code}`" for code in codes]
    columns = ["dim", "bits", *names, "256 states: less by", "bound 4^-bits"]
    lines = [table_row(columns), table_row(["---:"] * len(columns))]
    for row in results["rows"]:
        found = row["error"]
        cells = [str(row["dim"]), f"{row['bits']:g}", *(f"{found[code]:.5f}" for code in codes)]
        cells += [f"{1 - found['256'] / found[codes[0]]:.0%}", f"{row['bound']:.5f}"]
        lines.append(table_row(cells))
    vectors = results["vectors"] * results["rotations"]
    return "\n".join([*lines, "", f"{vectors} Gaussian vectors a row."])


def trellis_speed_table(results: dict[str, Any]) -> str:
    """One row for every instruction set, number of states and width: GB/s, and the error."""
    columns = ["instruction set", "states", "bits", "encode, GB/s of bf16", "decode, GB/s of f32"]
    columns += ["scores, million rows/s", "error"]
    lines = [table_row(columns), table_row(["---", *["---:"] * 6])]
    rows = results["rows"]
    for encode, decode, scores in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        cells = [encode["isa"], str(encode["states"]), f"{encode['bits']:g}"]
        for row in (encode, decode):
            cells.append(f"{row['gigabytes_per_second']:.2f}")
        cells.append(f"{results['vectors'] / scores['seconds']['median'] / 1e6:.1f}")
        lines.append(table_row([*cells, f"{decode['error'] ** 2:.4f}"]))
    lines += [
        "",
        f"{results['vectors']} vectors of dim {results['dim']}, {results['queries']} queries at "
        f"once, one thread of {results['machine']['processor']}; medians. "
        "Error: ‖x - x̂‖² / ‖x‖².",
    ]
    return "\n".join(lines)


def trellis_kl_table(results: dict[str, Any]) -> str:
    """One row for every model and width: both codes, and their difference."""
    columns = ["model", "bits", "bits in this run", "codebook", "trellis", "difference", "ratio"]
    lines = [table_row(columns), table_row(["---", *["---:"] * 6])]
    for row in results["rows"]:
        codebook, trellis = row["codebook"], row["trellis"]
        cells = [row["model"], f"{row['bits']:g}", f"{trellis['bits_per_value']:.2f}"]
        for one in (codebook["kl"], trellis["kl"], row["difference"]):
            cells += [f"{one['mean']:.4f} ± {one['half_width']:.4f}"]
        lines.append(table_row([*cells, f"{trellis['kl']['mean'] / codebook['kl']['mean']:.2f}"]))
    windows, tokens = results["windows"]
    lines += [
        "",
        f"{windows} windows of {tokens} tokens, the second half scored in chunks of "
        f"{results['chunk']}; ± half a 95 % interval over windows; differences are paired.",
    ]
    return "\n".join(lines)


def benchmark_table(results: dict[str, Any]) -> str:
    """One line for every row of `python -m benchmarks.run --json`, losers included."""
    rows, machine = results["rows"], results["machine"]
    # 0 bytes: nobody stated them.
    wanted = {name: any(row.get(name) for row in rows) for name in OPTIONAL_COLUMNS}
    columns = ["", "tokens", "threads", "median (quartiles)"]
    columns += [title for name, title in OPTIONAL_COLUMNS.items() if wanted[name]]
    lines = [table_row(columns), table_row(["---", *["---:"] * (len(columns) - 1)])]
    for row in rows:
        name = " ".join(part for part in (row.get("model"), row["contender"]) if part)
        cells = [name, f"{row['tokens']:,}", str(row["threads"]), _time(row["seconds"])]
        cells += [_optional(name, row.get(name)) for name in OPTIONAL_COLUMNS if wanted[name]]
        lines.append(table_row(cells))
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
    if busy := results.get("busy_processors"):
        where = "one processor" if len(set(busy)) == 1 else "a processor each"
        lines[-1] += f" Beside it {len(busy)} other processes computed all the time, on {where}."
    return "\n".join(lines)


def kernels_table(results: dict[str, Any]) -> str:
    """What the variants of every kernel need at most and at least, and each that spills."""
    kernels: dict[str, list[dict[str, Any]]] = {}
    for row in results["rows"]:
        kernels.setdefault(row["kernel"].partition(" ")[0], []).append(row)
    targets = list(results["rows"][0]["targets"])
    columns = ["kernel", "target", "variants", "registers", "shared memory, kB", "spills"]
    lines = [table_row([*columns, "tensor cores"]), table_row(["---", "---", *["---:"] * 4, "---"])]
    for name, rows in kernels.items():
        for target in targets:
            needs = [row["targets"][target] for row in rows]
            lines.append(table_row([f"`{name}`", target, str(len(rows)), *_ranges(needs)]))
    spilling = [
        f"- {row['kernel']}, {target}: {row['targets'][target]['spills']}"
        for row in results["rows"]
        for target in targets
        if row["targets"][target]["spills"]
    ]
    spills = ["", "Variants that spill, and how many instructions do:", "", *spilling]
    lines += spills if spilling else ["", "No variant spills."]
    return "\n".join([*lines, "", f"Registers of a thread; Triton {results['triton']}."])


def _ranges(needs: list[dict[str, Any]]) -> list[str]:
    def between(name: str, unit: int = 1) -> str:
        found = sorted(round(need[name] / unit) for need in needs)
        return f"{found[0]} to {found[-1]}" if found[0] < found[-1] else str(found[0])

    used = sorted({name for need in needs for name in need["tensor_cores"]})
    cores = ", ".join(f"`{name}`" for name in used) or "-"
    spills = max(need["spills"] for need in needs)
    return [between("registers"), between("shared_bytes", 1024), str(spills), cores]


OPTIONAL_COLUMNS = {
    "error": "error",
    "nbytes": "bytes moved",
    "share_of_read_bandwidth": "of read bandwidth",
    "tokens_per_second": "tokens/s",
    "tokens_per_second_of_all": "over all steps",
    "held_bytes": "cache holds",
}


def _optional(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name in ("nbytes", "held_bytes"):
        return f"{value / 1e6:.1f} MB"
    if name.startswith("tokens_per_second"):
        return f"{value:.2f}" if value < 10 else f"{value:.0f}"
    return f"{value:.1e}" if name == "error" else f"{value:.0%}"


def _time(seconds: dict[str, float]) -> str:
    unit, factor = ("ms", 1e3) if seconds["median"] >= 1e-3 else ("µs", 1e6)
    if seconds["median"] >= 1:
        unit, factor = "s", 1.0
    first, median, third = (factor * seconds[name] for name in ("first", "median", "third"))
    digits = 0 if median >= 100 else 1 if median >= 10 else 2
    return f"{median:.{digits}f} {unit} ({first:.{digits}f} to {third:.{digits}f})"


ROTATE = ROOT / "src/sixfold/kernels/rotate/README.md"
CPU_BLOCKS = tuple(
    Block(ROOT / "docs/cpu.md", RESULTS / f"cpu_{name}.json", f"cpu_{name}", benchmark_table)
    for name in (
        *("attention", "lengths", "encode", "scores", "step", "generate", "prefill"),
        *("busy_apart", "busy_together"),
    )
)
REAL_NEEDLES_BLOCKS = tuple(
    Block(
        ROOT / "docs/evaluation.md",
        RESULTS / f"needles_{model}.json",
        f"needles_{model}",
        real_needles_table,
    )
    for model in ("qwen25-coder-1.5b", "smollm2-135m", "gemma3-270m")
)
REAL_BLOCKS = (
    Block(ROOT / "docs/evaluation.md", RESULTS / "real_texts.json", "real_texts", real_texts_table),
    Block(ROOT / "docs/cpu.md", RESULTS / "real_speed.json", "real_speed", real_speed_table),
    Block(ROOT / "README.md", RESULTS / "real_speed.json", "real_speed_longest", longest_table),
)
EVALUATION_BLOCKS = tuple(
    Block(ROOT / "docs/evaluation.md", RESULTS / f"{name}.json", name, evaluation_table)
    for name in (
        *("eval_embedded", "eval_hard", "eval_smollm2-135m"),
        *("eval_gemma3-270m", "eval_qwen25-coder-1.5b"),
        *("eval_stories260K", "eval_babyllama_tok105"),
    )
)
ATTENTION = ROOT / "src/sixfold/kernels/attention/README.md"
ATTENTION_BLOCK = Block(ATTENTION, RESULTS / "cpu_trellis.json", "cpu_trellis", benchmark_table)
TRELLIS = ROOT / "src/sixfold/kernels/trellis/README.md"
TRELLIS_TABLES = {
    "trellis_choices": trellis_choices_table,
    "trellis_distortion": trellis_distortion_table,
    "trellis_kl": trellis_kl_table,
    "trellis_speed": trellis_speed_table,
}
TRELLIS_BLOCKS = tuple(
    Block(TRELLIS, RESULTS / f"{name}.json", name, table) for name, table in TRELLIS_TABLES.items()
)
REPRODUCTION = ROOT / "docs/reproduction.md", RESULTS / "reproduction.json"
REPRODUCTION_BLOCKS = tuple(
    Block(*REPRODUCTION, f"reproduction_{table.__name__}", table, table.__name__)
    for table in reproduction_tables.TABLES
)
LONG_CONTEXT = ROOT / "docs/long_context.md"
LONG_CONTEXT_BLOCKS = (
    Block(LONG_CONTEXT, RESULTS / "long_context.json", "million", long_context_tables.million),
    Block(LONG_CONTEXT, RESULTS / "needles.json", "needles", long_context_tables.needles),
)
NEEDLE_BLOCKS = tuple(
    Block(ROOT / "docs/evaluation.md", RESULTS / f"{name}.json", name, needle_table)
    for name in ("needles_embedded", "needles_hard")
)
TARGET_BLOCKS = tuple(
    Block(ROOT / "docs/evaluation.md", RESULTS / f"{part}_{name}.json", f"{part}_{name}_aim", table)
    for part, table in (("eval", evaluation_targets), ("needles", needle_targets))
    for name in ("embedded", "hard")
)
RECIPE_BLOCKS = tuple(
    Block(
        ROOT / "docs/recipe.md",
        RESULTS / "recipe.json",
        f"recipe_{study}",
        recipe_table,
        study,
    )
    for study in (
        *("splits", "splits_windows", "splits_trellis", "splits_trellis_windows"),
        *("spread", "first_tokens", "key_scales", "value_scales"),
        *("maps", "value_maps", "windows", "layers", "codes"),
    )
)
CODES_BLOCK = Block(ROOT / "docs/recipe.md", RESULTS / "codes.json", "codes", codes_table)
GPU_BLOCKS = tuple(
    Block(ROOT / "docs/gpu.md", RESULTS / f"{name}.json", name, kernels_table)
    for name in ("gpu_kernels", "gpu_kernels_triton36")
)
VLLM_BLOCKS = tuple(
    Block(ROOT / "docs/vllm.md", RESULTS / f"{name}.json", name, table)
    for name, table in (
        ("vllm_capacity", vllm_tables.capacity),
        ("vllm_kl", vllm_tables.divergence),
        ("vllm_load", vllm_tables.load),
        ("vllm_paired", vllm_tables.paired),
        ("vllm_memory", vllm_tables.paired),
    )
)
REAL_BLOCK = Block(
    ROOT / "README.md", RESULTS / "real_models.json", "real_models", real_models_table
)
INDEX_BLOCK = Block(
    ROOT / "docs/vector_search.md",
    RESULTS / "vector_index.json",
    "vector_index",
    vector_index_table,
)
SCALE_BLOCK = Block(
    ROOT / "docs/vector_search.md",
    RESULTS / "vector_scale.json",
    "vector_scale",
    vector_scale_table,
)
KINDS_BLOCK = Block(
    ROOT / "docs/vector_search.md",
    RESULTS / "vector_kinds.json",
    "vector_kinds",
    vector_kinds_table,
)
LISTS_BLOCK = Block(
    ROOT / "docs/vector_search.md",
    RESULTS / "vector_kinds.json",
    "vector_lists",
    vector_lists_table,
)
OPTIONAL_BLOCKS = (
    REAL_BLOCK,
    INDEX_BLOCK,
    SCALE_BLOCK,
    KINDS_BLOCK,
    LISTS_BLOCK,
    CODES_BLOCK,
    Block(ROOT / "README.md", RESULTS / "cpu_generate.json", "readme_speed", speed_table),
    *(
        *CPU_BLOCKS,
        *EVALUATION_BLOCKS,
        *NEEDLE_BLOCKS,
        *REAL_NEEDLES_BLOCKS,
        *REAL_BLOCKS,
        *TARGET_BLOCKS,
        *RECIPE_BLOCKS,
        ATTENTION_BLOCK,
        *TRELLIS_BLOCKS,
    ),
    *(*REPRODUCTION_BLOCKS, *LONG_CONTEXT_BLOCKS, *GPU_BLOCKS, *VLLM_BLOCKS),
)
ARCHITECTURES = ROOT / "docs/architectures.md", RESULTS / "architectures.json"
TRANSFORMERS_TESTS = RESULTS / "transformers_tests.json"
BLOCKS = (
    Block(*ARCHITECTURES, "architectures", architecture_table),
    Block(ARCHITECTURES[0], TRANSFORMERS_TESTS, "transformers_tests", transformers_tests_table),
    Block(ROOT / "README.md", RESULTS / "demo.json", "demo", demo_table),
    Block(ROOT / "docs/key_map.md", RESULTS / "key_map.json", "key_map", key_map_table),
    *(
        Block(ROOT / "docs/key_map.md", RESULTS / f"{name}.json", name, key_map_chunks_table)
        for name in ("key_map_chunks", "key_map_chunks_real")
    ),
    *(
        Block(ROOT / "docs/key_map.md", RESULTS / f"{name}.json", name, key_map_beginnings_table)
        for name in ("key_map_beginnings", "key_map_beginnings_smollm2")
    ),
    *(
        Block(ROOT / "docs/key_map.md", RESULTS / f"{name}.json", name, key_map_unseen_table)
        for name in ("key_map_unseen", "key_map_unseen_real")
    ),
    Block(ROTATE, RESULTS / "rotation.json", "rotation", rotation_table),
    *(block for block in OPTIONAL_BLOCKS if block.results.exists()),
)


def main() -> None:
    """Rewrite every document in place, and draw every picture."""
    for block in BLOCKS:
        block.document.write_text(block.rendered(), encoding="utf-8")
    document = json.loads((RESULTS / "needles.json").read_text(encoding="utf-8"))
    needles.draw(document, ROOT / "docs/needles.png")


if __name__ == "__main__":
    main()
