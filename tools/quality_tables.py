"""Tables of what caches cost in quality: evaluation, needles, recipe."""

from collections.abc import Sequence
from typing import Any

from sixfold.integrations.transformers.summary import LONG_CONTEXT
from tools.blocks import table_row


def evaluation_table(results: dict[str, Any]) -> str:
    """One row for every cache, by the bits it holds a value of a long context."""
    columns = ["cache", f"bits at {results['long_context']:,} tokens", "bits in this run"]
    columns += ["mean KL, nats", "99 % KL", "perplexity", "change", "same top token"]
    lines = [table_row(columns), table_row(["---", *["---:"] * (len(columns) - 1)])]
    for row in results["rows"]:
        kl, change, top = row["kl"], row["perplexity_change"], row["top1_agreement"]
        cells = [row["cache"], f"{row['bits_long']:.2f}", f"{row['bits_per_value']:.2f}"]
        cells += [f"{kl['mean']:.4f} ± {kl['half_width']:.4f}", f"{row['kl_p99']:.4f}"]
        cells += [f"{row['perplexity']:.2f}"]
        cells += [f"{change['mean']:+.2%} ± {change['half_width']:.2%}", f"{top['mean']:.1%}"]
        lines.append(table_row(cells))
    windows, tokens = results["windows"]
    plain = results["rows"][0]["uncompressed_perplexity"]
    # What older runs, which do not say it, were measured in.
    dtype = results.get("dtype", "float16")
    lines += [
        "",
        f"{windows} windows of {tokens} tokens, the second half scored in chunks of "
        f"{results['chunk']}; uncompressed perplexity {plain:.2f}; ± half a 95 % interval over "
        f"windows. {results['model']}, {dtype}, torch {results['machine']['versions']['torch']}, "
        f"transformers {results['machine']['versions']['transformers']}."
        + _left_out(results["left_out"]),
    ]
    return "\n".join(lines)


def _left_out(names: Sequence[str]) -> str:
    listed = ", ".join(f"`{name}`" for name in names)
    return f" Left out, as they do not work at its head dimension: {listed}." if names else ""


# What the project aims at, by bits: the change of perplexity at most, the share of equal top tokens
# at least, and the share of needles lost at most.
TARGETS: dict[float, tuple[float, float | None, float | None]] = {
    4: (0.003, 0.985, 0.005),
    3.5: (0.006, None, None),
    2.5: (0.02, None, 0.01),
}


def evaluation_targets(results: dict[str, Any]) -> str:
    """What was aimed at, and what the rows with the default windows measure."""
    rows = {row["cache"]: row for row in results["rows"]}
    columns = ["bits", "perplexity: at most", "measured", "same top token: at least", "measured"]
    lines = [table_row(columns), table_row(["---:"] * len(columns))]
    for bits, (most, least, _) in TARGETS.items():
        row = rows[f"**sixfold {bits:g}**"]
        change, top = row["perplexity_change"], row["top1_agreement"]
        cells = [f"{bits:g}", f"{most:+.1%}"]
        cells += [f"{change['mean']:+.2%} ± {change['half_width']:.2%}"]
        cells += ["-" if least is None else f"{least:.1%}"]
        cells += [f"{top['mean']:.1%} ± {top['half_width']:.1%}"]
        lines.append(table_row(cells))
    return "\n".join(lines)


def real_needles_table(results: dict[str, Any]) -> str:
    """One row a cache of `sixfold eval niah --json`, in the order of bits."""
    rows = results["rows"]
    lengths = sorted({cell["tokens"] for row in rows.values() for cell in row["cells"]})
    columns = ["cache", "bits per value", *(f"{n:,} tokens" for n in lengths), "all"]
    lines = [table_row(columns), table_row(["---"] + ["---:"] * (len(columns) - 1))]
    for name, row in sorted(rows.items(), key=lambda pair: -pair[1]["bits_long"]):
        ours = name.replace(".", "").isdigit()
        label = "uncompressed" if name == "16" else f"**sixfold {name}**" if ours else name
        each = [[cell for cell in row["cells"] if cell["tokens"] == tokens] for tokens in lengths]
        found = [
            f"{sum(c['exact'] for c in cells)} of {sum(c['asked'] for c in cells)}"
            for cells in each
        ]
        total = f"{row['exact']} of {row['asked']}"
        lines.append(table_row([label, f"{row['bits_long']:.2f}", *found, total]))
    note = (
        f"{results['model']} in the dtype of its weights; bits at {LONG_CONTEXT:,} tokens, default "
        "windows; numbers hidden in a novel at five depths, four documents of each length."
    )
    return "\n".join([*lines, "", note])


def needle_targets(results: dict[str, Any]) -> str:
    """The same of needles, and their difference in numbers."""
    rows = {row["cache"]: row for row in results["rows"]}
    plain = sum(rows["uncompressed"]["exact"].values())
    asked = sum(rows["uncompressed"]["asked"].values())
    lines = [table_row(["bits", "needles lost: at most", "measured"]), table_row(["---:"] * 3)]
    for bits, (_, _, most) in TARGETS.items():
        found = sum(rows[f"**sixfold {bits:g}**"]["exact"].values())
        aim = "-" if most is None else f"{100 * most:.1f} points"
        lost = f"{100 * (plain - found) / asked:.2f} points ({found} of {plain} found)"
        lines.append(table_row([f"{bits:g}", aim, lost]))
    return "\n".join(lines)


def needle_table(results: dict[str, Any]) -> str:
    """One row for every cache, a column for every length of document."""
    lengths = list(results["rows"][0]["asked"])
    columns = ["cache", "bits at 32,768 tokens", *(f"{int(n):,} tokens" for n in lengths), "all"]
    lines = [table_row(columns), table_row(["---", *["---:"] * (len(columns) - 1)])]
    for row in results["rows"]:
        asked, exact = row["asked"], row["exact"]
        shares = [exact[n] / asked[n] for n in lengths]
        whole = sum(exact.values()) / sum(asked.values())
        cells = [row["cache"], f"{row['bits_long']:.2f}", *(f"{share:.1%}" for share in shares)]
        lines.append(table_row([*cells, f"{whole:.1%}"]))
    lines += [
        "",
        f"{results['documents']} documents of every length, {results['needles']} needles in each, "
        f"all digits right. {results['model']}, float32.",
    ]
    return "\n".join(lines)


def recipe_table(results: dict[str, Any]) -> str:
    """One row for every model and case of a study; the first of a width is what ships."""
    rows, needles = results["rows"], any("needles_asked" in row for row in results["rows"])
    note = (
        f"{rows[-1]['windows']} windows of {results['window_tokens']} tokens, the second half "
        f"scored in chunks of {results['chunk']}; ± half a 95 % interval over windows, paired."
    )
    if needles:
        note += (
            f" {rows[-1]['needles_asked']} needles in documents of {results['needle_tokens']:,} "
            "tokens."
        )
    return "\n".join([*_cases(rows, needles=needles), "", note])


def codes_table(results: dict[str, Any]) -> str:
    """One row for every model and lead; the first of a width is what ships."""
    rows = results["rows"]
    windows = {row["model"]: row["windows"] for row in rows}
    counts = ", ".join(f"{count} ({model})" for model, count in windows.items())
    note = (
        f"Windows of {results['window_tokens']} tokens: {counts}; {results['prefill']} tokens "
        f"prefilled, the rest scored in chunks of {results['chunk']}; ± half a 95 % interval over "
        "windows, paired."
    )
    return "\n".join([*_cases(rows), "", note])


def _cases(rows: list[dict[str, Any]], *, needles: bool = False) -> list[str]:
    models = list(dict.fromkeys(row["model"] for row in rows))
    columns = ["model", "bits", "case", "bits at 32,768 tokens", "mean KL, nats"]
    columns += ["against the first", "99 % KL", "perplexity", "same top token"]
    columns += ["needles"] * needles
    lines = [table_row(columns), table_row(["---", "---:", "---", *["---:"] * (len(columns) - 3)])]
    for row in sorted(rows, key=lambda row: (models.index(row["model"]), -row["bits"])):
        cells = [row["model"], f"{row['bits']:g}", row["case"], f"{row['bits_long']:.2f}"]
        cells += _recipe_quality(row) if "kl" in row else ["-"] * 5
        if needles:
            cells.append(f"{row['needles_exact'] / row['needles_asked']:.1%}")
        lines.append(table_row(cells))
    return lines


def _recipe_quality(row: dict[str, Any]) -> list[str]:
    change, perplexity = row["kl_change"], row["perplexity_change"]
    return [
        f"{row['kl']['mean']:.4f}",
        _change(change) if change["mean"] else "",
        f"{row['kl_p99']:.3f}",
        _change(perplexity, 2),
        f"{row['top1_agreement']['mean']:.1%}",
    ]


def _change(estimate: dict[str, Any], digits: int = 0) -> str:
    """A relative change, and half its interval where there is more than one window."""
    width = estimate["half_width"]
    return f"{estimate['mean']:+.{digits}%}" + (f" ± {width:.{digits}%}" if width else "")
