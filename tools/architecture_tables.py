"""The tables of docs/architectures.md: the sweep of all, and transformers' own tests of some."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tools.blocks import table_row

OUTCOMES = {
    "fused": "attention runs on the codes",
    "partly fused": "attention of some layers runs on the codes, others get tensors dequantized",
    "dequantized": "compressed; attention gets tensors dequantized, and a warning says so",
    "refused": "`TurboQuantCache` raises `UnsupportedModelError`",
    "not built": "not compared: needs more than text, or no tiny config of it was found",
    "undecided": "compared, but wrong keys would not have been noticed",
    "failed": "raised another error",
    "wrong": "differs from the uncompressed model by more than the tolerance",
}


def architecture_table(results: dict[str, Any]) -> str:
    """How many of each outcome, then a row for every class that was compared, then the others."""
    rows = results["rows"]
    lines = [table_row(["outcome", "classes", "meaning"]), table_row(["---", "---:", "---"])]
    for outcome, meaning in OUTCOMES.items():
        count = sum(row["status"] == outcome for row in rows)
        lines.append(table_row([outcome, str(count), meaning]))
    lines += ["", f"{len(rows)} classes of transformers {results['transformers']}.", ""]
    columns = ["class", "outcome", "layers: on codes, compressed, all", "error on codes"]
    columns += ["error dequantized", "tolerance"]
    lines += [table_row(columns), table_row(["---", "---", *["---:"] * 4])]
    lines += [_compared(row) for row in rows if "tolerance" in row]
    lines += ["", table_row(["class", "outcome", "why"]), table_row(["---"] * 3)]
    for row in rows:
        if "tolerance" not in row:
            cells = [f"`{row['class']}`", row["status"], row["reason"].replace("|", "\\|")]
            lines.append(table_row(cells))
    return "\n".join(lines)


def transformers_tests_table(results: dict[str, Any]) -> str:
    """A row for every architecture: tests passed of those that count, in each setting and mode."""
    rows = results["rows"]
    kinds = list(dict.fromkeys((row["setting"], row["mode"]) for row in rows))
    found = {(row["architecture"], row["setting"], row["mode"]): row for row in rows}
    columns = ["architecture", *(f"{setting}, {mode}" for setting, mode in kinds)]
    lines = [table_row(columns), table_row(["---", *["---:"] * len(kinds)])]
    for name in dict.fromkeys(row["architecture"] for row in rows):
        cells = [_passed(found[name, *kind]["counts"]) for kind in kinds]
        lines.append(table_row([f"`{name}`", *cells]))
    sums = [_total(rows, kind) for kind in kinds]
    lines.append(table_row(["all", *map(_passed, sums)]))
    on_codes = [str(x["on codes"]) if x["on codes"] else "none" for x in sums]
    lines.append(table_row(["passed, and tokens were read from codes", *on_codes]))
    worst = [max(row["error"] for row in rows if _kind(row) == kind) for kind in kinds]
    lines.append(table_row(["largest error of scores", *(f"{size:.2g}" for size in worst)]))
    return "\n".join(lines)


def _kind(row: dict[str, Any]) -> tuple[str, str]:
    return row["setting"], row["mode"]


def _total(rows: Sequence[dict[str, Any]], kind: tuple[str, str]) -> Counter[str]:
    return sum((Counter(row["counts"]) for row in rows if _kind(row) == kind), Counter())


def _passed(counts: Mapping[str, int]) -> str:
    passed, lossy = counts.get("passed", 0), counts.get("lossy", 0)
    run = passed + lossy + counts.get("failed", 0)
    notes = [f"{counts[name]} {name}" for name in ("lossy", "failed") if counts.get(name)]
    return ", ".join([f"{passed} of {run}", *notes])


def _compared(row: dict[str, Any]) -> str:
    layers = row["layers"]
    cells = [f"`{row['class']}`", row["status"]]
    cells.append(f"{layers['fused']}, {layers['compressed']}, {layers['all']}")
    errors = ("fused_error", "dequantized_error", "tolerance")
    return table_row([*cells, *(f"{row[name]:.4f}" for name in errors)])
