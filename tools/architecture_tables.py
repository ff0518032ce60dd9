"""The table of docs/architectures.md: what becomes of every architecture of transformers."""

from collections.abc import Sequence
from typing import Any

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
    lines = [_joined(["outcome", "classes", "meaning"]), _joined(["---", "---:", "---"])]
    for outcome, meaning in OUTCOMES.items():
        count = sum(row["status"] == outcome for row in rows)
        lines.append(_joined([outcome, str(count), meaning]))
    lines += ["", f"{len(rows)} classes of transformers {results['transformers']}.", ""]
    columns = ["class", "outcome", "layers: on codes, compressed, all", "error on codes"]
    columns += ["error dequantized", "tolerance"]
    lines += [_joined(columns), _joined(["---", "---", *["---:"] * 4])]
    lines += [_compared(row) for row in rows if "tolerance" in row]
    lines += ["", _joined(["class", "outcome", "why"]), _joined(["---"] * 3)]
    for row in rows:
        if "tolerance" not in row:
            cells = [f"`{row['class']}`", row["status"], row["reason"].replace("|", "\\|")]
            lines.append(_joined(cells))
    return "\n".join(lines)


def _compared(row: dict[str, Any]) -> str:
    layers = row["layers"]
    cells = [f"`{row['class']}`", row["status"]]
    cells.append(f"{layers['fused']}, {layers['compressed']}, {layers['all']}")
    errors = ("fused_error", "dequantized_error", "tolerance")
    return _joined([*cells, *(f"{row[name]:.4f}" for name in errors)])


def _joined(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
