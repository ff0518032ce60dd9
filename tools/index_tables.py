"""The table of vector indexes, of what `benchmarks.vector_index` measured."""

from typing import Any

from tools.blocks import table_row


def vector_index_table(results: dict[str, Any]) -> str:
    """One row a method, those of equal bits together, the fastest first."""
    columns = ["index", "bits", "10 of 10 found", "first found", "queries/s, batch of 100"]
    columns += ["one query, ms", "build, s"]
    lines = [table_row(columns), table_row(["---", *["---:"] * 6])]
    order = sorted(results["rows"], key=lambda row: (row["bits"], -row["queries_per_second"]))
    for row in order:
        name = f"**{row['method']}**" if row["method"].startswith("sixfold") else row["method"]
        lines.append(
            table_row(
                [
                    name,
                    f"{row['bits']:g}",
                    f"{row['recall']:.3f}",
                    f"{row['first_found']:.3f}",
                    f"{row['queries_per_second']:,.0f}",
                    f"{1e3 * row['single_seconds']:.2f}",
                    f"{row['build_seconds']:.3f}",
                ]
            )
        )
    vectors, dim = results["vectors"]
    packages = ", ".join(f"{name} {version}" for name, version in results["packages"].items())
    machine = results["machine"]
    note = (
        f"{vectors:,} vectors of {dim} coordinates, {results['queries']:,} queries, by cosine. One "
        f"thread of {machine['processor']}, seconds of the processor; medians of "
        f"{results['rounds']} processes a method that took turns. {packages}."
    )
    return "\n".join([*lines, "", note])


def vector_scale_table(results: dict[str, Any]) -> str:
    """One row a size, and one for each number of lists that are looked at."""
    columns = ["vectors", "lists looked at", "found of what all lists hold"]
    columns += ["one query, ms", "batch of 100, queries/s", "memory", "build, s"]
    lines = [table_row(columns), table_row(["---:"] * len(columns))]
    for row in results["rows"]:
        lines.append(
            table_row(
                [
                    f"{row['vectors']:,}",
                    "all",
                    "",
                    *_times(row, results["batch"]),
                    f"{row['nbytes'] / 1e6:,.0f} MB",
                    f"{row['build_seconds']:.2f}",
                ]
            )
        )
        for number, some in enumerate(row["probed"]):
            cells = [f"{some['probes']} of {row['lists']:,}", f"{some['found']:.3f}"]
            build = f"{row['partition_seconds']:.1f}, the lists" if not number else ""
            lines.append(table_row(["", *cells, *_times(some, results["batch"]), "", build]))
    note = (
        f"Synthetic vectors of {results['dim']} coordinates at {results['bits']} bits around a "
        f"thousand centres, which suits lists. One thread of {results['machine']['processor']}, "
        "seconds of the processor."
    )
    return "\n".join([*lines, "", note])


def _times(row: dict[str, Any], batch: int) -> list[str]:
    return [f"{1e3 * row['single_seconds']:.1f}", f"{batch / row['batch_seconds']:,.0f}"]


def vector_lists_table(results: dict[str, Any]) -> str:
    """One row a number of lists that are looked at."""
    lists, (vectors, dim) = results["lists"], results["vectors"]
    columns = ["lists looked at", "10 of 10 found", "of all vectors, looked at"]
    lines = [table_row(columns), table_row(["---:"] * len(columns))]
    for row in lists["rows"]:
        cells = [str(row["probes"]), f"{row['found']:.3f}", f"{row['looked_at']:.1%}"]
        lines.append(table_row(cells))
    note = (
        f"{vectors:,} vectors of {dim} coordinates at {lists['bits']} bits in {lists['lists']} "
        f"lists, {results['queries']:,} queries, by cosine."
    )
    return "\n".join([*lines, "", note])


def vector_kinds_table(results: dict[str, Any]) -> str:
    """One row a number of bits."""
    kinds = {
        "as they are": "plain",
        "calibrated": "calibrated",
        "with one subject": "one_subject",
        "lengths vary": "lengths",
        "the same, calibrated": "lengths_calibrated",
        "refined": "refined",
    }
    lines = [table_row(["bits", *kinds]), table_row(["---:"] * (len(kinds) + 1))]
    for row in results["rows"]:
        lines.append(
            table_row([f"{row['bits']:g}", *(f"{row[name]:.3f}" for name in kinds.values())])
        )
    vectors, dim = results["vectors"]
    gains = []
    for batch in results["rows"][0]["speedups"]:
        own = [row["speedups"][batch] for row in results["rows"]]
        gains.append(f"{min(own):.1f} to {max(own):.1f} times at {batch}")
    note = (
        f"How many of the ten nearest are among the ten found: {vectors:,} vectors of {dim} "
        f"coordinates, {results['queries']:,} queries; {results['sample']:,} vectors to calibrate "
        f"with; lengths of 1 to {results['lengths']:g}. Two threads are faster than one by "
        f"{', '.join(gains)} queries at once."
    )
    return "\n".join([*lines, "", note])
