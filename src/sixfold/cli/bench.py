"""`sixfold bench`: the kernels of this machine against PyTorch's own attention."""

from typing import Annotated

import typer

from sixfold.cli.common import BitsOption, JsonOption, parse_bits
from sixfold.cli.render import Output, human_bytes, progress_bar
from sixfold.eval import machine
from sixfold.eval.speed import OPERATIONS, AttentionShape, measure_speed
from sixfold.eval.timing import Row


def bench(
    op: Annotated[str, typer.Option(help=f"One of {', '.join(OPERATIONS)}, or all.")] = "all",
    bits: BitsOption = "4,2",
    tokens: Annotated[int, typer.Option(min=64, help="Context, in tokens.")] = 8192,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(min=1, help="Key-value heads.")] = 8,
    head_dim: Annotated[int, typer.Option(min=2, help="Dimension of a head.")] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of each, in turn.")] = 9,
    json: JsonOption = None,
) -> None:
    """Time attention on codes, encoding and scores; errors against float64 beside the times."""
    output = Output(json)
    shape = AttentionShape(tokens=tokens, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    names = OPERATIONS if op == "all" else (op,)
    with progress_bar("timing") as progress:
        found = measure_speed(names, shape, parse_bits(bits), repeats=repeats, progress=progress)
    rows = [(name, row) for name in found for row in found[name]]
    output.table(
        f"{tokens} tokens, {heads} query and {kv_heads} key heads of {head_dim}",
        ["operation", "contender", "median ms", "spread", "error", "bytes moved", "GB/s"],
        [_cells(*row) for row in rows],
    )
    output.say(
        f"Measured on {machine.one_line()}; calls alternate, medians, spread is the interquartile "
        "range. Error: relative to the same operation on the original vectors in float64."
    )
    documents = [{"operation": name, **row.to_dict()} for name, row in rows]
    output.json({"machine": machine.describe(), "rows": documents})


def _cells(operation: str, row: Row) -> list[str]:
    return [
        operation,
        row.name,
        f"{1e3 * row.seconds.median:.2f}",
        f"{row.seconds.spread:.0%}",
        f"{row.error:.2e}",
        human_bytes(row.nbytes),
        f"{row.gigabytes_per_second:.2f}",
    ]
