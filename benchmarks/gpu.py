"""Correctness and speed of the Triton kernels on a GPU: ``python -m benchmarks.gpu --json FILE``.

One command, one JSON, under nine minutes on an H200; needs torch, triton, numpy, safetensors and
jaxtyping, and runs from a checkout (PYTHONPATH=src). Kernels are compared with the references
first. `--smoke` runs everything at sizes that prove only that it runs, on a CPU in Triton's
interpreter: no time in its rows means anything.
"""

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

NEEDED = ("torch", "triton", "numpy", "safetensors", "jaxtyping")
BITS = (2, 2.5, 3, 3.5, 4, 8)
BATCHES = (1, 8, 32)
CONTEXTS = (4096, 32768, 131072)
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
    parser.add_argument("--seconds", type=float, default=480, help="start no case after these")
    return parser.parse_args()


class Bench:
    """Collects rows; a case that fails or comes too late is a row that says so."""

    def __init__(self, smoke: bool, seconds: float) -> None:
        import torch

        from benchmarks.gpu_cases import Shape

        self.smoke, self.deadline = smoke, time.monotonic() + seconds
        self.device = torch.device("cpu" if smoke else "cuda")
        self.shape = Shape(4, 2, 64, 256, 512) if smoke else Shape()
        self.bits = (2.5, 4) if smoke else BITS
        self.rows: list[dict[str, Any]] = []
        self.bandwidth = 0.0

    def seconds(self, call: Callable[[], Any]) -> tuple[float, float, float]:
        """Quartiles of a call's time: CUDA events, a cold cache before every call."""
        if self.smoke:
            started = time.perf_counter()
            call()
            return (time.perf_counter() - started,) * 3
        from triton.testing import do_bench

        first, median, third = do_bench(call, warmup=20, rep=80, quantiles=[0.25, 0.5, 0.75])
        return first / 1e3, median / 1e3, third / 1e3

    def add(self, case: str, timed: Any, **notes: Any) -> float:
        """Time a contender and keep its row."""
        first, median, third = self.seconds(timed.call)
        share = timed.nbytes / median / self.bandwidth if self.bandwidth else None
        row = {"case": case, "contender": timed.name, **notes, "seconds": [first, median, third]}
        row |= {"nbytes": timed.nbytes, "error": timed.error, "share_of_copy_bandwidth": share}
        self.rows.append(row)
        print(f"{case:34} {timed.name:24} {median * 1e6:10.1f} us  error {timed.error}", flush=True)
        return median

    def run(self, case: str, work: Callable[[str], None]) -> None:
        """Do the work of a case; what it raises becomes its row."""
        import torch

        if time.monotonic() > self.deadline:
            self.rows.append({"case": case, "skipped": "out of time"})
            return
        try:
            work(case)
        except (RuntimeError, ValueError) as error:
            if self.smoke:
                raise
            self.rows.append({"case": case, "failed": str(error)[:500]})
            print(f"{case}: {error}", flush=True)
        if not self.smoke:
            torch.cuda.empty_cache()

    def copy(self, case: str) -> None:
        """What a copy reads and writes a second."""
        import torch

        from benchmarks.gpu_cases import Timed

        source = torch.ones(2**20 if self.smoke else 2**32, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        nbytes = 2 * source.nbytes
        median = self.add(case, Timed("copy", lambda: target.copy_(source), nbytes))
        self.bandwidth = nbytes / median

    def attention(self, batch: int, tokens: int) -> Callable[[str], None]:
        """Decode attention on codes and on bfloat16."""

        def work(case: str) -> None:
            from benchmarks import gpu_cases as cases

            shape, size = self.shape, (batch, self.shape.kv_heads, tokens, self.shape.dim)
            keys = cases.random(*size, device=self.device, seed=1)
            values = cases.random(*size, device=self.device, seed=2)
            query = cases.random(batch, shape.heads, 1, shape.dim, device=self.device, seed=3)
            small = batch * tokens <= EXACT_TOKENS
            exact = cases.exact_attention(query, keys, values) if small else None
            full = keys.nbytes + values.nbytes

            def add(name: str, call: Callable[[], Any], nbytes: int, **notes: Any) -> float:
                error = None if exact is None else cases.relative(call(), exact)
                timed = cases.Timed(name, call, nbytes, error)
                return self.add(case, timed, batch=batch, tokens=tokens, **notes)

            best = min(
                add(name, call, full) for name, call in cases.sdpa_contenders(query, keys, values)
            )
            paged = {bits: cases.compressed(keys, values, bits, shape) for bits in self.bits}
            # A cache of codes has no room for the originals either.
            del keys, values
            for bits, pages in paged.items():
                median = add(
                    f"sixfold {bits:g} bits",
                    partial(cases.attend, query.float(), pages, bits),
                    pages.nbytes,
                    bits=bits,
                )
                self.rows[-1]["times_faster_than_best_bf16"] = best / median

        return work

    def logits(self, case: str) -> None:
        """Attention logits alone, the paper's headline."""
        from benchmarks.gpu_cases import logits_contenders

        batch, tokens = (1, 128) if self.smoke else (8, 32768)
        times = {}
        for timed in logits_contenders(batch, tokens, self.bits, self.shape, self.device):
            median = self.add(case, timed, batch=batch, tokens=tokens)
            times[timed.name] = median
            self.rows[-1]["times_faster_than_fp32"] = times["keys fp32"] / median

    def store(self, case: str) -> None:
        """Encoding a prompt's keys and values, beside the layer that makes them."""
        from benchmarks import gpu_cases as cases

        tokens, shape = (128 if self.smoke else 8192), self.shape
        layer = cases.prefill_layer(tokens, shape, self.device)
        whole = self.add(case, cases.Timed("prefill of a layer", layer, 0), tokens=tokens)
        x = cases.random(1, shape.kv_heads, tokens, shape.dim, device=self.device, seed=6)
        for bits in self.bits:
            paged = cases.compressed(x, x, bits, shape)

            def both(bits: float = bits, paged: Any = paged) -> None:
                cases.store(x, bits, "key", paged.keys, paged.slots)
                cases.store(x, bits, "value", paged.values, paged.slots)

            timed = cases.Timed(f"store {bits:g} bits", both, 2 * x.nbytes + paged.nbytes)
            median = self.add(case, timed, tokens=tokens, bits=bits)
            self.rows[-1]["share_of_prefill"] = median / whole

    def cases(self) -> Iterator[tuple[str, Callable[[str], None]]]:
        """Everything, the most wanted first."""
        yield "copy", self.copy
        yield "store", self.store
        yield "logits", self.logits
        sizes = [(b, t) for t in CONTEXTS for b in BATCHES]
        # The targets' own sizes, then the rest.
        sizes.sort(key=lambda size: size not in ((8, 32768), (1, 131072)))
        for batch, tokens in [(2, 128)] if self.smoke else sizes:
            yield f"attention, batch {batch}, {tokens:,} tokens", self.attention(batch, tokens)


def main() -> None:
    """Check, time and write."""
    _require()
    options = parse()
    if options.smoke:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    if not options.smoke and not torch.cuda.is_available():
        sys.exit("benchmarks.gpu needs a CUDA device; --smoke runs it without one")
    from benchmarks import gpu_checks
    from sixfold.eval import machine

    started = time.monotonic()
    bench = Bench(options.smoke, options.seconds)
    if options.smoke:
        gpu_checks.use_interpreter()
    checks = gpu_checks.checks(bench.device, bench.bits, quick=options.smoke)
    for case, work in bench.cases():
        bench.run(case, work)
    results = {
        "machine": machine.describe(),
        "smoke": options.smoke,
        "shape": asdict(bench.shape),
        "copy_bandwidth": bench.bandwidth,
        "seconds": round(time.monotonic() - started, 1),
        "checks": checks,
        "rows": bench.rows,
    }
    options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    wrong = [check["check"] for check in checks if not check["passed"]]
    if wrong:
        sys.exit(f"kernels are wrong: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
