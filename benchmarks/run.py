"""Time the kernels on the shapes that matter: ``python -m benchmarks.run --op attention``.

Rows on which the codes lose stay in the table.
"""

import argparse
import json
from pathlib import Path

from sixfold.eval import machine
from sixfold.eval.speed import OPERATIONS, AttentionShape, Measured, measure_speed

# Widths with one codebook index a coordinate, then those with one a pair.
WIDTHS = (4, 3, 2, 3.5, 2.5)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--op", choices=OPERATIONS, action="append", help="default: all of them")
    parser.add_argument("--tokens", type=int, action="append", help="default: 4096 and 32768")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def line(tokens: int, row: Measured) -> str:
    """One row of the table."""
    return (
        f"{row.operation:10} {tokens:7} {row.implementation:20} {1e3 * row.time.median:9.2f} ms "
        f"± {row.time.spread:4.0%}  error {row.error:.2e}  {row.nbytes / 1e6:8.1f} MB "
        f"{row.gigabytes_per_second:7.2f} GB/s"
    )


def main() -> None:
    """Measure, print as it goes, and write the JSON."""
    arguments, results = parse(), []
    print(machine.one_line())
    for tokens in arguments.tokens or (4096, 32768):
        for operation in arguments.op or OPERATIONS:
            shape = AttentionShape(tokens=tokens)
            for row in measure_speed([operation], shape, WIDTHS, repeats=arguments.repeats):
                print(line(tokens, row), flush=True)
                results.append({"tokens": tokens, **row.to_dict()})
    if arguments.json:
        document = {"machine": machine.describe(), "rows": results}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
