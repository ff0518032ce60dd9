"""One file, and README's table, of what `sixfold eval perplexity` measured on several models.

    python -m tools.real_models build/real/*.json --json docs/results/real_models.json

`make results-real` measures, calls this and renders the table.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.blocks import table_row

Results = dict[str, Any]
# Directories of tests, and names on the hub.
TITLES = {
    "smollm2-135m": "SmolLM2 135M",
    "SmolLM2-135M-Instruct": "SmolLM2 135M",
    "gemma3-270m": "Gemma 3 270M",
    "gemma-3-270m": "Gemma 3 270M",
    "qwen25-coder-1.5b": "Qwen2.5-Coder 1.5B",
    "Qwen2.5-Coder-1.5B-Instruct": "Qwen2.5-Coder 1.5B",
}
PEERS = {"fp8": "fp8 of transformers, simulated", "q4_0": "q4_0 of llama.cpp, simulated"}


def collect(found: Sequence[Results]) -> Results:
    """The results of several models as one document, a row for every model and cache.

    Raises:
        SystemExit: They were not measured alike: other settings, another text, other caches.
    """
    first = found[0]
    rows: list[Results] = []
    for one in found:
        if one["asked"] != first["asked"] or one["rows"].keys() != first["rows"].keys():
            raise SystemExit(f"{one['model']} was measured unlike {first['model']}")
        about = {"model": Path(one["model"]).name, "dtype": one["dtype"]}
        rows += [{**about, "cache": name, **row} for name, row in one["rows"].items()]
    order = {name: index for index, name in enumerate(TITLES)}
    rows.sort(key=lambda row: order.get(row["model"], len(order)))
    return {"machine": first["machine"], "asked": first["asked"], "rows": rows}


def real_models_table(results: Results) -> str:
    """One line a cache, one column a model: KL, and how often the most likely token stays."""
    models = list(dict.fromkeys(row["model"] for row in results["rows"]))
    found = {(row["model"], row["cache"]): row for row in results["rows"]}
    caches = sorted(
        dict.fromkeys(row["cache"] for row in results["rows"]),
        key=lambda name: (name in PEERS, -max(found[model, name]["bits_long"] for model in models)),
    )
    titles = [TITLES.get(model, model) for model in models]
    lines = [
        table_row(["cache", "bits per value", *titles]),
        table_row(["---", "---:", *["---:"] * len(models)]),
    ]
    for name in caches:
        rows = [found[model, name] for model in models]
        bits = bits_range(rows)
        label = PEERS.get(name, f"Sixfold, `bits={name}`")
        lines.append(table_row([label, bits, *map(cell, rows)]))
    return "\n".join([*lines, "", _note(results, models, titles)])


def bits_range(rows: Sequence[Results]) -> str:
    """Bits a value of one cache on several models."""
    held = sorted(f"{row['bits_long']:.1f}" for row in rows)
    return held[0] if held[0] == held[-1] else f"{held[0]} to {held[-1]}"


def cell(row: Results) -> str:
    """Mean KL with its interval, and how often the most likely token stays."""
    kl = row["kl"]
    error = "" if kl["half_width"] is None else f" ± {kl['half_width']:.4f}"
    return f"{kl['mean']:.4f}{error} ({row['top1_agreement']['mean']:.1%})"


def _note(results: Results, models: Sequence[str], titles: Sequence[str]) -> str:
    asked, rows = results["asked"], {row["model"]: row for row in results["rows"]}
    windows = " and ".join(sorted({str(row["windows"]) for row in rows.values()}))
    dtypes = ", ".join(
        f"{title} in {rows[m]['dtype']}" for m, title in zip(models, titles, strict=True)
    )
    return (
        "Each cell: the mean KL divergence of the next-token probabilities from those of the "
        "uncompressed model, in nats (0 is no change; ± half a 95 % interval over windows), and in "
        "brackets how often the most likely token stays the same. Bits per value at "
        f"{asked['long_context']:,} tokens, everything counted. {windows} windows of "
        f"{asked['window']} tokens of a novel, the first {asked['prefill']} "
        f"prefilled, the rest in chunks of {asked['chunk']}; {dtypes}. "
        "Sixfold keeps the first 4 and the last 64 to 127 tokens exactly, which is much of such "
        "short windows."
    )


def main() -> None:
    """Collect the files named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="of sixfold eval perplexity --json")
    parser.add_argument("--json", type=Path, required=True, help="where to write")
    asked = parser.parse_args()
    found = [json.loads(path.read_text(encoding="utf-8")) for path in asked.files]
    asked.json.write_text(json.dumps(collect(found), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
