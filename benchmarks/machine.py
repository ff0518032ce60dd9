"""The machine as benchmarks see it: how fast it reads, and what decides which kernels run."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from sixfold.eval import machine
from sixfold.eval.timing import Case, Contender, measure
from sixfold.kernels._dispatch import OPERATIONS, implementation
from sixfold.kernels._native import extension

# Several times the last level of cache of any processor this is for.
BUFFER_BYTES = 2**30
OVERRIDES = (
    *("SIXFOLD_BACKEND", "SIXFOLD_ISA", "SIXFOLD_AMX", "SIXFOLD_CPU_EXACT", "SIXFOLD_THREADS"),
    *("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"),
)


def read_bandwidth(threads: int, nbytes: int = BUFFER_BYTES, repeats: int = 7) -> float:
    """Bytes a second that `threads` threads read from memory, the median of some passes.

    Every word is added up and the sum is checked. Without the compiled extension torch adds.
    """
    # Written, word by word different: pages that nobody wrote are all the same page of zeros.
    words = torch.arange(nbytes // 8)
    expected = len(words) * (len(words) - 1) // 2
    cpu = extension()

    def read() -> None:
        if isinstance(cpu, str):
            total = int(words.sum())
        else:
            total = cpu.sum_words(words.data_ptr(), len(words), 1, threads)
        assert total == expected, (total, expected)

    (row,) = measure(Case([Contender("read", read)]), repeats=repeats)
    return nbytes / row.seconds.median


@contextmanager
def busy(processors: Sequence[int]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Keep other processes computing inside the block, as on a shared machine.

    One on each of `processors`. They are bound, because where they run decides how fast the
    threads of a model are beside them, and systems move such processes once in minutes.
    """
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in processors]
    try:
        for process, processor in zip(running, processors, strict=True):
            os.sched_setaffinity(process.pid, {processor})
        yield running
    finally:
        for one in running:
            one.kill()
            one.wait()


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch, and all that asks torch, use `count` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def describe() -> dict[str, Any]:
    """`sixfold.eval.machine.describe`, the kernels that run, and variables that change that."""
    cpu, device = extension(), torch.device("cpu")
    backends = {name: implementation(name, device).__name__.split(".")[-1] for name in OPERATIONS}
    return {
        **machine.describe(),
        "backends": backends,
        "isa": None if isinstance(cpu, str) else cpu.isa(),
        "environment": {name: os.environ[name] for name in OVERRIDES if name in os.environ},
    }
