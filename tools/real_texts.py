"""One file, and a table, of what `sixfold eval perplexity` measured on several texts.

    python -m tools.real_texts build/texts/*/*.json --json docs/results/real_texts.json

The folder of a file names its text. `make results-texts` measures and renders the table.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.blocks import table_row
from tools.real_models import PEERS, TITLES, Results, bits_range, cell

TEXTS = {
    "wikitext2": "WikiText-2, its test set",
    "code": "Python, `argparse.py` and `typing.py` of 3.11",
}
CONTENDERS = {**PEERS, "kivi-4": "KIVI of 4 bits, simulated"}


def collect(found: Sequence[tuple[str, Results]]) -> Results:
    """Results and the names of their texts as one document, a row for every text, model, cache."""
    rows: list[Results] = []
    for text, one in found:
        asked = {name: one["asked"][name] for name in ("window", "prefill", "chunk")}
        about = {"text": text, "model": Path(one["model"]).name, "dtype": one["dtype"], **asked}
        rows += [{**about, "cache": name, **row} for name, row in one["rows"].items()]
    order = {name: index for index, name in enumerate((*TEXTS, *TITLES))}
    rows.sort(key=lambda row: (order[row["text"]], order[row["model"]]))
    return {"machine": found[0][1]["machine"], "rows": rows}


def real_texts_table(results: Results) -> str:
    """One line a text and cache, one column a model: KL, and how often the top token stays."""
    rows = results["rows"]
    models = list(dict.fromkeys(row["model"] for row in sorted(rows, key=_by_model)))
    found = {(row["text"], row["model"], row["cache"]): row for row in rows}
    lines = [
        table_row(["text", "cache", "bits per value", *(TITLES[model] for model in models)]),
        table_row(["---", "---", "---:", *["---:"] * len(models)]),
    ]
    for text in dict.fromkeys(row["text"] for row in rows):
        for cache in _caches(rows):
            own = [found.get((text, model, cache)) for model in models]
            bits = bits_range([row for row in own if row])
            label = CONTENDERS.get(cache, f"Sixfold, `bits={cache}`")
            cells = ["-" if row is None else cell(row) for row in own]
            lines.append(table_row([TEXTS[text], label, bits, *cells]))
    return "\n".join([*lines, "", _note(rows, models)])


def _by_model(row: Results) -> int:
    return list(TITLES).index(row["model"])


def _caches(rows: Sequence[Results]) -> list[str]:
    """Ours first, then the others, each by their bits."""
    bits = {row["cache"]: row["bits_long"] for row in rows}
    return sorted(bits, key=lambda name: (name in CONTENDERS, -bits[name]))


def _note(rows: Sequence[Results], models: Sequence[str]) -> str:
    said = []
    for model in models:
        own = [row for row in rows if row["model"] == model]
        plain = {row["text"]: row["uncompressed_perplexity"] for row in own}
        each = " and ".join(f"{value:.1f}" for value in plain.values())
        said.append(
            f"{TITLES[model]}: {own[0]['windows']} windows of {own[0]['window']:,} tokens in "
            f"{own[0]['dtype']}, perplexity {each} uncompressed"
        )
    return (
        "Each cell: mean KL divergence from the uncompressed model in nats, ± half a 95 % interval "
        "over windows, and in brackets how often the most likely token stays the same. The first "
        "half of a window is prefilled, the rest scored in chunks of 64. " + "; ".join(said) + "."
    )


def main() -> None:
    """Collect the files named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="of sixfold eval perplexity --json")
    parser.add_argument("--json", type=Path, required=True, help="where to write")
    asked = parser.parse_args()
    found = [(x.parent.name, json.loads(x.read_text(encoding="utf-8"))) for x in asked.files]
    document: dict[str, Any] = collect(found)
    asked.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
