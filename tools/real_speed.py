"""The table of `benchmarks.real_speed`: a real model from end to end."""

from typing import Any

from tools.blocks import table_row
from tools.real_models import TITLES


def longest_table(results: dict[str, Any]) -> str:
    """`real_speed_table` of the longest prompt of each model alone, as README has it."""
    rows, longest = results["rows"], dict[str, int]()
    for row in rows:
        longest[row["model"]] = max(longest.get(row["model"], 0), row["tokens"])
    kept = [row for row in rows if row["tokens"] == longest[row["model"]]]
    return real_speed_table({**results, "rows": kept})


def real_speed_table(results: dict[str, Any]) -> str:
    """One line a model, number of tokens and cache."""
    heads = ["model", "tokens", "cache", "first token", "tokens/s", "prompt takes", "steps take"]
    heads.append("cache holds")
    lines = [table_row(heads), table_row(["---", "---:", "---", *["---:"] * (len(heads) - 3)])]
    order = list(TITLES)
    rows = sorted(results["rows"], key=lambda row: (order.index(row["model"]), row["tokens"]))
    for row in rows:
        sizes = (row[f"{what}_bytes"] / 1e6 for what in ("prefill", "step", "cache"))
        name = row["contender"].replace("transformers ", "").replace(", sdpa", "")
        cells = [TITLES[row["model"]], f"{row['tokens']:,}", name]
        cells.append(f"{row['first_token_seconds']:.2f} s")
        cells.append(f"{1 / row['step_seconds']:.1f}")
        lines.append(table_row([*cells, *(f"{size:,.0f} MB" for size in sizes)]))
    return "\n".join([*lines, "", _note(results)])


def _note(results: dict[str, Any]) -> str:
    machine, versions = results["machine"], results["machine"]["versions"]
    rounds = " or ".join(map(str, sorted({len(row["rounds"]) for row in results["rows"]})))
    return (
        f"{machine['processor']}, {machine['threads']} threads, torch {versions['torch']}, "
        f"transformers {versions['transformers']}. Medians of {rounds} rounds, in which all caches "
        f"take turns, each in a process of its own; {results['steps']} tokens are generated. "
        "Memory: the most that the process held during the prompt, or the steps, beyond the model."
    )
