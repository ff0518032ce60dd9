"""Tables of docs/vllm.md."""

from typing import Any

from tools.blocks import table_row

Results = dict[str, Any]
NAMES = {"auto": "bfloat16", "fp8": "fp8"}
MODELS = {"random": "8 layers, shapes of Llama 3 8B"}
TEXTS = {"haystack": "the text in the package", "novel": "a novel"}


def capacity(results: Results) -> str:
    """Tokens in the same memory, beside bfloat16."""
    dims = results["dims"]
    lines = [
        table_row(["backend", *(f"head dimension {dim}" for dim in dims)]),
        table_row(["---", *["---:"] * len(dims)]),
    ]
    for row in results["rows"]:
        cells = [
            f"{x:g} bytes, {4 * dim / x:.2f}×" for x, dim in zip(row["bytes"], dims, strict=True)
        ]
        lines.append(table_row([f"`{row['contender']}`", *cells]))
    return "\n".join(
        [*lines, "", "Bytes of a key and a value of one head; bfloat16 has 4 a dimension."]
    )


def divergence(results: Results) -> str:
    """KL by model and contender, chunks side by side."""
    chunks = results["asked"]["chunks"]
    lines = [
        table_row(["model", "cache", *(f"KL, chunks of {n}" for n in chunks), "same top token"]),
        table_row(["---", "---", *["---:"] * (len(chunks) + 1)]),
    ]
    found: dict[tuple[str, str], list[Results]] = {}
    for row in results["rows"]:
        found.setdefault((row["model"], row["contender"]), []).append(row)
    for (model, contender), rows in found.items():
        cells = [f"{row['kl']:.4f}" for row in rows]
        top = " / ".join(f"{row['same_top_token']:.1%}" for row in rows)
        lines.append(table_row([model, _name(contender), *cells, top]))
    window = results["asked"]["window"]
    read: dict[tuple[str, int], list[str]] = {
        (row["text"], row["windows"]): [] for row in results["rows"]
    }
    for (model, _), rows in found.items():
        models = read[rows[0]["text"], rows[0]["windows"]]
        models += [] if model in models else [model]
    texts = "; ".join(
        f"{', '.join(models)}: {windows} of {TEXTS.get(text, text)}"
        for (text, windows), models in read.items()
    )
    return "\n".join(
        [
            *lines,
            "",
            f"Windows of {window} tokens, the last {window // 3} scored ({texts}); weights in "
            "bfloat16.",
        ]
    )


def load(results: Results) -> str:
    """One row a model, threads, number of streams and contender."""
    titles = ["model", "threads", "streams", "cache", "output tokens/s", "all tokens/s"]
    titles += ["first token, median", "each further", "preemptions"]
    lines = [table_row(titles), table_row(["---", "---:", "---:", "---", *["---:"] * 5])]
    for row in results["rows"]:
        speed = f"{row['output_tokens_per_second']:.1f}"
        if row["rounds"] > 1:
            speed += f" ({row['slowest']:.1f} to {row['fastest']:.1f})"
        cells = [
            MODELS.get(row["model"], row["model"]),
            str(row["threads"]),
            str(row["streams"]),
            _name(row["contender"]),
            speed,
            f"{row['total_tokens_per_second']:.0f}",
            f"{row['first_token_ms'] / 1000:.1f} s",
            f"{row['token_ms']:.0f} ms",
            f"{row['preemptions']:.0f}",
        ]
        lines.append(table_row(cells))
    machine, first = results["machine"], results["rows"][0]
    memory = f", {first['memory']:g} MiB of blocks" if first["memory"] else ""
    return "\n".join(
        [
            *lines,
            "",
            f"{machine['processor']} ({', '.join(machine['instruction_sets'])}), prompts of "
            f"{first['tokens'] * 4 // 10:,} to {first['tokens'] * 16 // 10:,} tokens, "
            f"{first['output']} tokens of output{memory}; medians, and the range where there was "
            "more than one round.",
        ]
    )


def paired(results: Results) -> str:
    """One row a model, number of streams and contender."""
    titles = ["model", "streams", "most tokens of a step", "cache", "first token, median"]
    titles += ["last first token", "each further", "decoding, tokens/s", "in all, tokens/s"]
    lines = [
        table_row([*titles, "preemptions"]),
        table_row(["---", *["---:"] * 2, "---", *["---:"] * 6]),
    ]
    for row in results["rows"]:
        cells = [
            MODELS.get(row["model"], row["model"]),
            str(row["streams"]),
            f"{row['step']:,}" if row["step"] else "vLLM's default",
            _name(row["contender"]),
            f"{row['first_token_seconds']:.1f} s",
            f"{row['prompts_seconds']:.1f} s",
            f"{1000 * row['token_seconds']:.0f} ms",
            f"{row['decode_tokens_per_second']:.0f}",
            f"{row['output_tokens_per_second']:.1f}",
            f"{row['preemptions']:.0f}",
        ]
        lines.append(table_row(cells))
    machine, asked = results["machine"], results["asked"]
    memory = f", {asked['memory']:g} MiB of blocks" if asked["memory"] else ""
    return "\n".join(
        [
            *lines,
            "",
            f"{machine['processor']} ({', '.join(machine['instruction_sets'])}), one thread, "
            f"prompts of {asked['tokens'] * 4 // 10:,} to {asked['tokens'] * 16 // 10:,} tokens, "
            f"{asked['output']} tokens of output{memory}; CPU seconds.",
        ]
    )


def _name(contender: str) -> str:
    return NAMES.get(contender, f"`{contender}`")
