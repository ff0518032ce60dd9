"""Correctness and speed of the Triton kernels on a GPU: ``python -m benchmarks.gpu --json FILE``.

One command, one JSON, under nine minutes on an H200; needs torch, triton, numpy, safetensors and
jaxtyping, and runs from a checkout (PYTHONPATH=src). Kernels are compared with the references
first, then timed as CUDA graphs, as a compiled decode step runs them. The JSON is written anew
after every case and check: what raises, or comes too late, costs nothing but itself. A kernel that
reads where it must not spoils all that its process does after it: `benchmarks/gpu_first.sh` gives
every group of cases (`--groups`) a process of its own. `--smoke` runs everything
at sizes that prove only that it runs, on a CPU in Triton's interpreter: no time in its rows means
anything.
"""

import argparse
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.gpu_cases import Code

NEEDED = ("torch", "triton", "numpy", "safetensors", "jaxtyping")
BITS = (2, 2.5, 3, 3.5, 4, 8)
TRELLIS_BITS = (2, 2.5, 3, 4)
BATCHES = (1, 8, 32)
CONTEXTS = (4096, 32768, 131072)
UNTIMED = ("first", "checks")
GROUPS = (*UNTIMED, "targets", "step", "sweep", "store", "matrix")
# Exact attention in float64 is worked out up to here; longer contexts run the same kernels.
EXACT_TOKENS = 32768 * 8


def _require() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"benchmarks.gpu needs {', '.join(missing)}: pip install {' '.join(missing)}")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="write the results here")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on a CPU too")
    parser.add_argument(
        "--groups",
        nargs="+",
        choices=GROUPS,
        default=GROUPS[1:],
        help="all but `first`, one of the checks",
    )
    parser.add_argument("--seconds", type=float, default=480, help="start no case after these")
    return parser.parse_args()


class Bench:
    """Collects checks and rows; a case that fails or comes too late is a row that says so."""

    def __init__(self, path: Path, smoke: bool, seconds: float) -> None:
        import torch

        from benchmarks.gpu_cases import Code, Shape

        self.path, self.smoke = path, smoke
        self.started = time.monotonic()
        self.deadline = self.started + seconds
        self.device = torch.device("cpu" if smoke else "cuda")
        self.shape = Shape(4, 2, 64, 256, 512) if smoke else Shape()
        self.bits = (2.5, 4) if smoke else BITS
        paths = (2.5,) if smoke else TRELLIS_BITS
        self.codes = [*map(Code, self.bits), *(Code(bits, "trellis") for bits in paths)]
        self.checks: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.bandwidth = 0.0

    def add(
        self, case: str, one: Any, exact: Any = None, capture: bool = True, **notes: Any
    ) -> float:
        """Time a contender, as a CUDA graph if told to, and keep its row.

        One that fails takes for ever.
        """
        from benchmarks import gpu_cases as cases
        from sixfold.eval import timing

        named = {"case": case, "contender": one.name, **notes}
        try:
            error = timing.error_of(one, exact)
            graph = cases.captured(one.call) if capture and not self.smoke else None
            calls = [timing.time_once(one.call)] if self.smoke else cases.calls(graph or one.call)
            seconds = timing.Quartiles.of(calls)
        # Compilers and drivers raise what they like, and the rest is still wanted.
        except Exception as problem:
            self.fail(problem, **named)
            return math.inf
        share = one.nbytes / seconds.median / self.bandwidth if self.bandwidth else None
        row = {**named, "seconds": asdict(seconds), "nbytes": one.nbytes, "error": error}
        # Without a graph a short call waits for the host, and its time says so.
        row |= {"share_of_copy_bandwidth": share, "captured": graph is not None}
        self.rows.append(row)
        print(f"{case:34} {one.name:24} {seconds.median * 1e6:10.1f} us  error {error}", flush=True)
        return seconds.median

    def fail(self, problem: Exception, **named: Any) -> None:
        """Keep what went wrong as a row."""
        if self.smoke:
            raise problem
        self.rows.append({**named, "failed": f"{type(problem).__name__}: {problem}"[:500]})
        print(f"{' '.join(map(str, named.values()))}: {problem}", flush=True)

    def run(self, case: str, work: Callable[[str], None]) -> None:
        """Do the work of a case; what it raises becomes its row."""
        import torch

        if time.monotonic() > self.deadline:
            self.rows.append({"case": case, "skipped": "out of time"})
        else:
            try:
                work(case)
            except Exception as problem:
                self.fail(problem, case=case)
            if not self.smoke:
                torch.cuda.empty_cache()
        self.write()

    def write(self) -> None:
        """All there is so far."""
        from sixfold.eval import machine

        results = {
            "machine": machine.describe(),
            "smoke": self.smoke,
            "shape": asdict(self.shape),
            "copy_bandwidth": self.bandwidth,
            "seconds": round(time.monotonic() - self.started, 1),
            "checks": self.checks,
            "rows": self.rows,
        }
        self.path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    def first(self, case: str) -> None:
        """Whether anything is right at all: attention at 4 bits."""
        from benchmarks.gpu_cases import Code

        self._check(case, [Code(4)], most=1)

    def check(self, case: str) -> None:
        """Whether kernels are right, a row each; half of the time at most."""
        self._check(case, self.codes)

    def _check(self, case: str, codes: "list[Code]", most: int | None = None) -> None:
        from benchmarks import gpu_checks

        late = self.started + (self.deadline - self.started) / 2
        for name, work in islice(gpu_checks.checks(self.device, codes, self.smoke), most):
            if time.monotonic() > late:
                self.checks.append({"check": name, "passed": None, "skipped": "out of time"})
                continue
            try:
                found = work()
            except Exception as problem:
                self.fail(problem, case=case, check=name)
                found = {"passed": False}
            self.checks.append({"check": name, **found})
            self.write()
            print(f"{'ok  ' if found['passed'] else 'FAIL'} {name}", flush=True)

    def copy(self, case: str) -> None:
        """What a copy reads and writes a second."""
        import torch

        from sixfold.eval.timing import Contender

        size = 2**20 if self.smoke else 2**32
        # Not of one value: memory may compress that.
        source = torch.randint(256, (size,), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        nbytes = 2 * source.nbytes
        median = self.add(case, Contender("copy", lambda: target.copy_(source), nbytes))
        self.bandwidth = nbytes / median

    def attention(self, size: tuple[int, int]) -> tuple[str, Callable[[str], None]]:
        """Decode attention on codes and on bfloat16, for a batch of sequences of some tokens."""
        batch, tokens = size

        def work(case: str) -> None:
            from benchmarks import gpu_cases as cases
            from benchmarks import gpu_peers as peers
            from sixfold.eval.timing import Contender

            query, keys, values = cases.inputs(batch, tokens, self.shape, self.device)
            small = batch * tokens <= EXACT_TOKENS
            exact = cases.exact_attention(query, keys, values) if small else None
            full = keys.nbytes + values.nbytes

            sizes: dict[str, Any] = {"batch": batch, "tokens": tokens}
            best = min(
                self.add(case, Contender(name, call, full), exact, **sizes)
                for name, call in peers.sdpa_contenders(query, keys, values)
            )
            for name, call, nbytes in peers.vllm_contenders(query, keys):
                self.add(case, Contender(name, call, nbytes), **sizes)
            paged = {code: cases.compressed(keys, values, code, self.shape) for code in self.codes}
            # A cache of codes has no room for the originals either.
            del keys, values
            for code, pages in paged.items():
                call = partial(cases.attend, query.float(), pages, code)
                one = Contender(f"sixfold {code}", call, pages.nbytes)
                median = self.add(case, one, exact, **asdict(code), **sizes)
                self.rows[-1]["times_faster_than_best_bf16"] = best / median

        return f"attention, batch {batch}, {tokens:,} tokens", work

    def sweep(self, size: tuple[int, int]) -> tuple[str, Callable[[str], None]]:
        """Attention at 4 bits, launched in other ways; the first row is as it is shipped."""
        batch, tokens = size

        def work(case: str) -> None:
            from benchmarks import gpu_cases as cases
            from benchmarks.gpu_sweep import launched, ways
            from sixfold.eval.timing import Contender

            query, keys, values = cases.inputs(batch, tokens, self.shape, self.device)
            for code in [cases.Code(4), *([] if self.smoke else [cases.Code(4, "trellis")])]:
                pages = cases.compressed(keys, values, code, self.shape)
                call = partial(cases.attend, query.float(), pages, code)
                notes: dict[str, Any] = {"batch": batch, "tokens": tokens, **asdict(code)}
                one = Contender(f"sixfold {code}", call, pages.nbytes)
                self.add(case, one, **notes)
                for way in ways(self.smoke):
                    name = ", ".join(f"{count} {what}" for what, count in way.items())
                    with launched(**way):
                        self.add(case, replace(one, name=f"{code}, {name}"), **notes | way)
                self.write()

        return f"sweep, batch {batch}, {tokens:,} tokens", work

    def step(self, size: tuple[int, int]) -> tuple[str, Callable[[str], None]]:
        """A layer's whole decode step: append, attention, and a page whenever one is full."""
        batch, tokens = size

        def work(case: str) -> None:
            from benchmarks import gpu_step as steps
            from benchmarks.gpu_cases import Code
            from sixfold.eval.timing import Contender

            sizes: dict[str, Any] = {"batch": batch, "tokens": tokens}
            call, nbytes = steps.plain_step(batch, tokens, self.shape, self.device)
            plain = self.add(case, Contender("bf16, sdpa", call, nbytes), **sizes)
            del call
            # The interpreter takes half a minute for a page of paths.
            paths = () if self.smoke else (Code(4, "trellis"), Code(2.5, "trellis"))
            for code in (Code(4), *paths):
                make = partial(steps.compressed_step, batch, tokens, code, self.shape, self.device)
                call, nbytes = make()
                notes: dict[str, Any] = asdict(code) | sizes
                if not self.smoke:
                    notes["kernels"] = steps.launches(call)
                median = self.add(case, Contender(f"sixfold {code}", call, nbytes), **notes)
                self.rows[-1]["times_faster_than_bf16"] = plain / median
                if not self.smoke:
                    one = Contender(f"sixfold {code}, compiled", steps.compiled(make()[0]), nbytes)
                    self.add(case, one, capture=False, **notes)

        return f"layer step, batch {batch}, {tokens:,} tokens", work

    def logits(self, case: str) -> None:
        """Attention logits alone, the paper's headline."""
        from benchmarks.gpu_cases import logits_contenders

        batch, tokens = (1, 128) if self.smoke else (8, 32768)
        times = {}
        for one, exact in logits_contenders(batch, tokens, self.bits, self.shape, self.device):
            median = self.add(case, one, exact, batch=batch, tokens=tokens)
            times[one.name] = median
            self.rows[-1]["times_faster_than_fp32"] = times["keys fp32"] / median

    def store(self, case: str) -> None:
        """Encoding a prompt's keys and values, beside the layer that makes them."""
        from benchmarks import gpu_cases as cases
        from sixfold.eval.timing import Contender

        tokens, shape = (128 if self.smoke else 8192), self.shape
        layer = cases.prefill_layer(tokens, shape, self.device)
        whole = self.add(case, Contender("prefill of a layer", layer), tokens=tokens)
        x = cases.random(1, shape.kv_heads, tokens, shape.dim, device=self.device, seed=6)
        for code in self.codes:
            paged = cases.compressed(x, x, code, shape)

            both = partial(cases.store, x, x, code, paged, paged.pages.slots)
            one = Contender(f"store {code}", both, 2 * x.nbytes + paged.nbytes)
            median = self.add(case, one, tokens=tokens, **asdict(code))
            self.rows[-1]["share_of_prefill"] = median / whole

    def cases(self, groups: Sequence[str]) -> Iterator[tuple[str, Callable[[str], None]]]:
        """The cases of these groups, in the order of `GROUPS`: the most wanted first."""
        targets = [(2, 128)] if self.smoke else [(8, 32768), (1, 131072)]
        steps = [(2, 256)] if self.smoke else [(1, 32768), (8, 32768)]
        sizes = [] if self.smoke else [(b, t) for t in CONTEXTS for b in BATCHES]
        of: dict[str, list[tuple[str, Callable[[str], None]]]] = {
            "first": [("first check", self.first)],
            "checks": [("checks", self.check)],
            "targets": [*map(self.attention, targets)],
            "step": [*map(self.step, steps)],
            "sweep": [*map(self.sweep, targets)],
            "store": [("store", self.store), ("logits", self.logits)],
            "matrix": [self.attention(size) for size in sizes if size not in targets],
        }
        chosen = [group for group in GROUPS if group in groups]
        timed = [group for group in chosen if group not in UNTIMED]
        for group in chosen[: len(chosen) - len(timed)]:
            yield from of[group]
        if timed:
            # What times are compared with.
            yield "copy", self.copy
        for group in timed:
            yield from of[group]


def main() -> None:
    """Check, time and write."""
    _require()
    options = parse()
    if options.smoke:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    if not options.smoke and not torch.cuda.is_available():
        sys.exit("benchmarks.gpu needs a CUDA device; --smoke runs it without one")
    if options.smoke:
        from benchmarks import gpu_checks

        gpu_checks.use_interpreter()
    bench = Bench(options.json, options.smoke, options.seconds)
    for case, work in bench.cases(options.groups):
        bench.run(case, work)
    wrong = [check["check"] for check in bench.checks if check["passed"] is False]
    if wrong:
        sys.exit(f"kernels are wrong: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
