"""The tables of docs/long_context.md."""

from collections.abc import Sequence
from typing import Any


def million(results: dict[str, Any]) -> str:
    """One row for every width; the uncompressed bytes below."""
    plain, bandwidth = results["plain_nbytes"], results["read_bandwidth"]
    head = ["bits", "bytes held", "smaller", "filled in", "step", "its floor", "error"]
    head += ["needles", "after a crop to half: bytes", "error", "needle that is gone"]
    rows = []
    for row in results["rows"]:
        whole, half = row["whole"], row["half"]
        rows.append(
            [
                *(f"{row['bits']:g}", _megabytes(row["nbytes"]), f"{plain / row['nbytes']:.2f}×"),
                *(f"{row['fill_seconds']:.1f} s", _milliseconds(row["step_seconds"])),
                *(_milliseconds(row["nbytes"] / bandwidth), f"{whole['error']:.3f}"),
                f"{whole['needles']} (cosine ≥ {whole['needle_cosine']:.3f})",
                *(_megabytes(row["half_nbytes"]), f"{half['error']:.3f}"),
                f"cosine ≤ {half['gone_cosine']:.2f}",
            ]
        )
    lines = [
        _table(head, rows),
        "",
        f"{results['tokens']:,} tokens, one layer of 32 query and 8 key-value heads of 128. "
        f"Uncompressed they take {_megabytes(plain)}, which "
        f"{results['machine']['processor']} with {results['machine']['threads']} threads, reading "
        f"{bandwidth / 1e9:.1f} GB/s, needs {_milliseconds(results['plain_floor_seconds'])} to "
        "read once: a floor for its step, not a measurement. The whole process, all widths at "
        f"once, peaked at {_megabytes(results['peak_resident_bytes'])} of resident memory.",
    ]
    return "\n".join(lines)


def needles(results: dict[str, Any]) -> str:
    """One row for every cache, one column for every length."""
    rows = results["rows"]
    sizes = list(rows[0]["found"])
    body = []
    for row in rows:
        found = [sum(row["found"][size]) for size in sizes]
        asked = sum(len(row["found"][size]) for size in sizes)
        body.append(
            [row["cache"], f"{row['bits']:.2f}", *map(str, found), f"{sum(found) / asked:.3f}"]
        )
    head = ["cache", f"bits at {_thousands(sizes[-1])}", *map(_thousands, sizes), "all"]
    factors = ", ".join(f"{results['factors'][size]:g} at {_thousands(size)}" for size in sizes)
    return "\n".join(
        [
            _table(head, body),
            "",
            f"Needles found of {len(results['depths'])} a length. YaRN factors: {factors}.",
        ]
    )


def _thousands(size: str) -> str:
    return f"{int(size) // 1000}k"


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.0f} MB"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.0f} ms"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---:"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
