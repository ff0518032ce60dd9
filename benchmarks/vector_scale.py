"""An index by its size: ``python -m benchmarks.vector_scale --json FILE``, in a few minutes.

Synthetic vectors of 128 coordinates around a thousand centres, in a memory map of float16 that is
read piece by piece. One thread; seconds of the processor, the median of some calls.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import machine
from sixfold import Index

DIM, BITS, CENTRES = 128, 2, 1000
SIZES = (100_000, 1_000_000, 10_000_000)
BLOCK, BATCH, CALLS = 100_000, 100, 5
PROBES = (1, 4, 16, 64)


def make(path: Path, count: int) -> np.ndarray:
    """Vectors in a file; returns them, mapped."""
    x = np.lib.format.open_memmap(path, "w+", np.float16, (count, DIM))
    random = np.random.default_rng(0)
    centres = random.standard_normal((CENTRES, DIM), dtype=np.float32)
    for start in range(0, count, BLOCK):
        part = x[start : start + BLOCK]
        noise = random.standard_normal(part.shape, dtype=np.float32)
        part[:] = centres[random.integers(CENTRES, size=len(part))] + 0.7 * noise
    x.flush()
    mapped: np.ndarray = np.load(path, mmap_mode="r")
    return mapped


def seconds(call: Any) -> float:
    """Median seconds of the processor."""
    times = []
    for _ in range(CALLS):
        begun = time.process_time()
        call()
        times.append(time.process_time() - begun)
    return statistics.median(times)


def measure(count: int, folder: Path) -> dict[str, Any]:
    """One size."""
    x = make(folder / "x.npy", count)
    index = Index(DIM, BITS)
    begun = time.process_time()
    index.add(x)
    build = time.process_time() - begun
    # Vectors that are in the index, half a step of noise away.
    chosen = np.linspace(0, count - 1, BATCH).astype(np.int64)
    noise = np.random.default_rng(1).standard_normal((BATCH, DIM), dtype=np.float32)
    queries = x[chosen].astype(np.float32) + 0.35 * noise
    found = index.search(queries, 1).ids[:, 0]
    row = {
        "vectors": count,
        "build_seconds": build,
        "nbytes": index.nbytes,
        "single_seconds": seconds(lambda: index.search(queries[0])),
        "batch_seconds": seconds(lambda: index.search(queries)),
        "found": float((found == chosen).mean()),
    }
    everything = index.search(queries).ids
    begun = time.process_time()
    index.partition()
    row |= {"partition_seconds": time.process_time() - begun, "lists": index.lists}
    return row | {"probed": [probed(index, queries, everything, n) for n in PROBES]}


def probed(
    index: Index, queries: np.ndarray, everything: np.ndarray, probes: int
) -> dict[str, Any]:
    """What a search of so many lists finds of what one of all finds, and how long it takes."""
    found = index.search(queries, probes=probes).ids
    return {
        "probes": probes,
        "found": float((found[:, :, None] == everything[:, None]).any(2).mean()),
        "single_seconds": seconds(lambda: index.search(queries[0], probes=probes)),
        "batch_seconds": seconds(lambda: index.search(queries, probes=probes)),
    }


def main() -> None:
    """Measure every size; print and write a row for each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for count in arguments.sizes:
            rows.append(measure(count, Path(folder)))
            print(json.dumps(rows[-1]), flush=True)
    if arguments.json:
        about = {"dim": DIM, "bits": BITS, "batch": BATCH}
        document = {"machine": machine.describe(), **about, "rows": rows}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
