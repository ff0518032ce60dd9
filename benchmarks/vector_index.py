"""Vector indexes side by side: ``python -m benchmarks.vector_index BASE QUERIES --json FILE``.

BASE and QUERIES are .npy files of vectors. Every method runs alone in processes of its own, one
thread each, and the processes of all methods take turns: a slow moment of a shared machine hits
them alike. Times are seconds of the processor. Peers are those that are installed:
`pip install faiss-cpu turbovec`.

The floor of a batch: vectors·dim products a query, of 8 bits. Of a single query: the bytes of the
codes once. Recall: the share of the exact ten nearest by cosine among the ten found.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine

K, BATCH, SAMPLE = 10, 100, 2048
ROUNDS, CALLS = 5, 9
# Seconds that a process measures at least, so that few calls of a slow method are enough.
LEAST_SECONDS = 0.3

Search = Callable[[np.ndarray, int], np.ndarray]
Build = Callable[[np.ndarray], tuple[Search, float]]


def sixfold_index(bits: int, tiles: bool = True, calibrated: bool = False) -> Build:
    """Ours, with or without the tiles of AMX, with or without a fit to a sample."""

    def build(base: np.ndarray) -> tuple[Search, float]:
        import torch

        from sixfold import Index

        torch.set_num_threads(1)
        if not tiles:
            os.environ["SIXFOLD_AMX"] = "0"
        # Tables that all indexes of a process share.
        Index(base.shape[1], bits).add(base[:100])
        index, begun = Index(base.shape[1], bits), time.process_time()
        if calibrated:
            index.calibrate(sample(base))
        index.add(base)
        return lambda q, k: index.search(q, k).ids, time.process_time() - begun

    return build


def sample(base: np.ndarray) -> np.ndarray:
    """What is calibrated with: vectors chosen at random."""
    return np.ascontiguousarray(base[np.random.default_rng(0).choice(len(base), SAMPLE, False)])


def turbovec_index(bits: int, calibrated: bool) -> Build:
    """TurboQuant by turbovec."""

    def build(base: np.ndarray) -> tuple[Search, float]:
        import turbovec  # type: ignore[import-not-found]

        index, begun = (
            turbovec.TurboQuantIndex(dim=base.shape[1], bit_width=bits),
            time.process_time(),
        )
        if calibrated:
            index.calibrate(sample(base))
        index.add(base)
        index.prepare()
        seconds = time.process_time() - begun
        return lambda q, k: np.asarray(index.search(q, k)[1]).astype(np.int64), seconds

    return build


def faiss_index(make: Callable[[Any, int], Any]) -> Build:
    """One of FAISS, by inner product of vectors of length 1."""

    def build(base: np.ndarray) -> tuple[Search, float]:
        import faiss

        faiss.omp_set_num_threads(1)
        index, begun = make(faiss, base.shape[1]), time.process_time()
        index.train(base)
        index.add(base)
        return lambda q, k: index.search(q, k)[1], time.process_time() - begun

    return build


def _pq(faiss: Any, dim: int, bits: int) -> Any:
    return faiss.IndexPQFastScan(dim, dim * bits // 4, 4, faiss.METRIC_INNER_PRODUCT)


def _rabitq(faiss: Any, dim: int, bits: int) -> Any:
    coded = faiss.IndexRaBitQFastScan(dim, faiss.METRIC_INNER_PRODUCT, 32, bits)
    return faiss.IndexPreTransform(faiss.RandomRotationMatrix(dim, dim), coded)


def methods() -> dict[str, tuple[str, float, Build]]:
    """The package that each method needs, its bits a coordinate, and how it is built."""
    found: dict[str, tuple[str, float, Build]] = {
        f"sixfold {bits} bits": ("sixfold", bits, sixfold_index(bits)) for bits in (1, 2, 3, 4, 8)
    }
    for bits in (1, 2, 4):
        fitted = sixfold_index(bits, calibrated=True)
        found[f"sixfold {bits} bits, calibrated"] = "sixfold", bits, fitted
    for bits in (2, 4):
        name = f"sixfold {bits} bits, without AMX"
        found[name] = "sixfold", bits, sixfold_index(bits, tiles=False)
        for calibrated in (False, True):
            name = f"turbovec {bits} bits{', calibrated' if calibrated else ''}"
            found[name] = "turbovec", bits, turbovec_index(bits, calibrated)
    found["faiss, uncompressed"] = "faiss", 32, faiss_index(lambda f, d: f.IndexFlatIP(d))
    for bits in (1, 2, 4):
        scan, rabit = partial(_pq, bits=bits), partial(_rabitq, bits=bits)
        found[f"faiss PQFastScan {bits} bits"] = "faiss", bits, faiss_index(scan)
        found[f"faiss RaBitQFastScan {bits} bits"] = "faiss", bits, faiss_index(rabit)
    return found


def unit(x: np.ndarray) -> np.ndarray:
    """Of length 1, in float32."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    scaled: np.ndarray = x / np.linalg.norm(x, axis=1, keepdims=True)
    return scaled


def exact_neighbors(base: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """The K nearest by float64, [queries, K]."""
    wide = base.T.astype(np.float64)
    found = [
        np.argsort(-(part.astype(np.float64) @ wide), axis=1)[:, :K]
        for part in np.array_split(queries, max(1, len(queries) // 100))
    ]
    return np.concatenate(found)


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    """The share of the exact neighbours that are among those found."""
    hits = [len(set(a) & set(b)) for a, b in zip(found.tolist(), exact.tolist(), strict=True)]
    return float(np.mean(hits)) / K


def measure(name: str, base: np.ndarray, queries: np.ndarray, exact: np.ndarray) -> dict[str, Any]:
    """One method, in this process."""
    search, build_seconds = methods()[name][2](base)
    found = search(queries, K)
    first = (found == exact[:, :1]).any(1)
    return {
        "build_seconds": build_seconds,
        "recall": recall(found, exact),
        "first_found": float(first.mean()),
        "batch_seconds": _seconds(lambda i: search(_some(queries, i, BATCH), K)),
        "single_seconds": _seconds(lambda i: search(_some(queries, i, 1), K)),
    }


def _some(queries: np.ndarray, call: int, count: int) -> np.ndarray:
    start = call * count % max(1, len(queries) - count + 1)
    return queries[start : start + count]


def _seconds(call: Callable[[int], object]) -> float:
    """Median seconds of the processor of a call."""
    call(0)
    times: list[float] = []
    while len(times) < CALLS or sum(times) < LEAST_SECONDS:
        begun = time.process_time()
        call(len(times))
        times.append(time.process_time() - begun)
    return statistics.median(times)


def rounds(names: list[str], arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Results of processes that take turns."""
    threads = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    for number in range(arguments.rounds):
        for name in names:
            command = [sys.executable, "-m", "benchmarks.vector_index"]
            files = [str(arguments.base), str(arguments.queries)]
            done = subprocess.run(
                [*command, *files, "--alone", name],
                env=os.environ | threads,
                capture_output=True,
                text=True,
                check=True,
            )
            print(f"{number + 1} of {arguments.rounds}: {name}", flush=True)
            yield name, json.loads(done.stdout.splitlines()[-1])


def summary(name: str, bits: float, found: list[dict[str, Any]]) -> dict[str, Any]:
    """One row: medians over processes, and their quartiles."""
    row: dict[str, Any] = {"method": name, "bits": bits}
    for key in ("recall", "first_found"):
        row[key] = statistics.median(one[key] for one in found)
    for key in ("build_seconds", "batch_seconds", "single_seconds"):
        times = sorted(one[key] for one in found)
        row[key] = statistics.median(times)
        row[f"{key}_range"] = [times[len(times) // 4], times[-1 - len(times) // 4]]
    row["queries_per_second"] = BATCH / row["batch_seconds"]
    return row


def main() -> None:
    """Measure the methods that are installed; print and write a row for each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("base", type=Path, help=".npy of float vectors [n, dim]")
    parser.add_argument("queries", type=Path, help="the same of queries, at least 100")
    parser.add_argument("--methods", nargs="+", help="names of rows; all by default")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    base, queries = unit(np.load(arguments.base)), unit(np.load(arguments.queries))
    truth = Path(os.environ.get("SIXFOLD_BENCH_TRUTH", ""))
    if arguments.alone:
        print(json.dumps(measure(arguments.alone, base, queries, np.load(truth))))
        return
    known = methods()
    names = arguments.methods or list(known)
    names = [name for name in names if importlib.util.find_spec(known[name][0])]
    collected: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "exact.npy"
        np.save(path, exact_neighbors(base, queries))
        os.environ["SIXFOLD_BENCH_TRUTH"] = str(path)
        for name, result in rounds(names, arguments):
            collected[name].append(result)
    rows = [summary(name, known[name][1], found) for name, found in collected.items()]
    for row in rows:
        print(
            f"{row['method']:32} recall {row['recall']:.3f}  {row['queries_per_second']:8.0f} q/s"
            f"  single {1e3 * row['single_seconds']:.3f} ms  build {row['build_seconds']:.3f} s"
        )
    if arguments.json:
        document = {
            "machine": machine.describe(),
            "packages": _versions(names),
            "vectors": list(base.shape),
            "queries": len(queries),
            "k": K,
            "batch": BATCH,
            "rounds": arguments.rounds,
            "rows": rows,
        }
        text = json.dumps(document, indent=2) + "\n"
        arguments.json.write_text(text, encoding="utf-8")


def _versions(names: list[str]) -> dict[str, str]:
    distributions = {"turbovec": "turbovec", "faiss": "faiss-cpu"}
    used = {methods()[name][0] for name in names} & distributions.keys()
    return {name: version(distributions[name]) for name in sorted(used)}


if __name__ == "__main__":
    main()
