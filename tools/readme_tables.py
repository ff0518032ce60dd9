"""Tables of README."""

from typing import Any

from tools.blocks import table_row

LONG = 32768
COLUMNS = (
    *("bits per value", "needles found", "perplexity", "mean KL, nats"),
    *("same top token", "bytes held", "smaller", "tokens/s"),
)


def demo_table(results: dict[str, Any]) -> str:
    """The README's table and the sentence under it."""
    lines = [table_row(COLUMNS), table_row(["---:"] * len(COLUMNS)), *map(_line, results["rows"])]
    windows, tokens = results["perplexity_windows"]
    machine = results["machine"]
    lines += [
        "",
        f"`sixfold demo` on {machine['processor']}, {machine['threads']} threads, torch "
        f"{machine['versions']['torch']}, the model inside the package, in bfloat16. Needles: "
        f"five-digit numbers hidden in {results['context']} tokens. Perplexity, KL (from the "
        f"uncompressed model, ± half a 95 % interval) and top token: {windows} windows of {tokens} "
        f"tokens. Bytes: everything a cache of {results['context']} tokens holds, windows and "
        "tables included; the share of those falls as contexts grow.",
    ]
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    plain = row["kl_half_width"] is None and row["kl"] == 0
    error = row["kl_half_width"]
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
    return table_row(cells)


def speed_table(results: dict[str, Any]) -> str:
    """Tokens a second with a long context, every cache that was timed with one."""
    rows = [row for row in results["rows"] if row["tokens"] == LONG]
    columns = ["model", "cache", "tokens per second", "cache holds"]
    lines = [table_row(columns), table_row(["---", "---", "---:", "---:"])]
    titles = {"embedded": "in the package", "random": "layers as in Llama 3 8B"}
    for row in rows:
        speed, held = row["tokens_per_second"], row["held_bytes"] / 1e6
        name = row["contender"].replace("sixfold", "Sixfold,")
        cells = [titles[row["model"]], name, f"{speed:.3g}", f"{held:,.0f} MB"]
        lines.append(table_row(cells))
    machine = results["machine"]
    return "\n".join(
        [
            *lines,
            "",
            f"With {LONG:,} tokens in the cache, on {rows[0]['threads']} cores of one "
            f"{machine['processor']} with AVX-512; weights in bfloat16.",
        ]
    )
