"""What `Index` finds of other kinds of data, or of the same by other means.

``python -m benchmarks.vector_kinds BASE QUERIES --json FILE``: two .npy files of vectors. How many
of the exact ten nearest are among the ten found: calibrated with vectors chosen at random, with
those of one subject alone (the nearest to one of them), and with none; by inner products where
lengths vary by 100; ranked again by the vectors themselves; in some of the lists of a partition.
And how much a second thread is worth to batches, by the clock.
"""

import argparse
import dataclasses
import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import machine
from benchmarks.vector_index import SAMPLE, K, exact_neighbors, recall, sample, unit
from sixfold import Index
from sixfold.eval.timing import Case, Contender, measure
from sixfold.index.metric import Metric

BITS = (1, 2, 3, 4)
LENGTHS = 100.0
REPEATS = 31
BATCHES = (1, 100, 256)
LIST_BITS = 4
PROBES = (1, 4, 16, 64)


def subject(base: np.ndarray) -> np.ndarray:
    """As many vectors as `sample`, all about one thing."""
    return base[np.argsort(-(base @ base[0]))[:SAMPLE]]


def filled(base: np.ndarray, bits: int, metric: Metric, fit: np.ndarray | None = None) -> Index:
    """An index of these vectors."""
    index = Index(base.shape[1], bits, metric)
    if fit is not None:
        index.calibrate(fit)
    with warnings.catch_warnings():
        # That a subject does not speak for all is what is measured.
        warnings.simplefilter("ignore")
        index.add(base)
    return index


@dataclasses.dataclass(frozen=True)
class Data:
    """Vectors, and what is nearest to the queries."""

    base: np.ndarray
    queries: np.ndarray
    exact: np.ndarray

    @classmethod
    def of(cls, base: np.ndarray, queries: np.ndarray) -> "Data":
        return cls(base, queries, exact_neighbors(base, queries))

    def found(self, index: Index, refine: Any = None) -> float:
        """The share of the nearest that an index of them finds."""
        return recall(index.search(self.queries, K, refine=refine).ids, self.exact)


def kinds(unit_data: Data, long_data: Data, bits: int) -> dict[str, Any]:
    """One row."""
    base, long, queries = unit_data.base, long_data.base, unit_data.queries
    plain, fitted = filled(base, bits, "cosine"), filled(base, bits, "cosine", sample(base))
    return {
        "bits": bits,
        "plain": unit_data.found(plain),
        "calibrated": unit_data.found(fitted),
        "one_subject": unit_data.found(filled(base, bits, "cosine", subject(base))),
        "lengths": long_data.found(filled(long, bits, "ip")),
        "lengths_calibrated": long_data.found(filled(long, bits, "ip", sample(long))),
        "refined": unit_data.found(plain, refine=base),
        "speedups": {str(batch): _speedup(plain, queries[:batch]) for batch in BATCHES},
    }


def in_lists(data: Data) -> dict[str, Any]:
    """What searches of some lists find, and what of the vectors those hold."""
    index = filled(data.base, LIST_BITS, "cosine")
    index.partition()
    rows = []
    for probes in (*PROBES, index.lists):
        ids = index.search(data.queries, K, probes=probes).ids
        held = index.search(data.queries, len(index), probes=probes).scores > -np.inf
        found = recall(ids, data.exact)
        rows.append({"probes": probes, "found": found, "looked_at": float(held.mean())})
    return {"bits": LIST_BITS, "lists": index.lists, "rows": rows}


def _speedup(index: Index, queries: np.ndarray) -> float:
    """Of all these queries at once, on two threads."""
    contenders = [
        Contender(
            str(threads),
            lambda: index.search(queries, K),
            result=None,
            # Awake, as after a call before.
            lead=lambda: index.search(queries, K),
            prepare=partial(torch.set_num_threads, threads),
        )
        for threads in (1, 2)
    ]
    one, two = measure(Case(contenders), repeats=REPEATS)
    return one.seconds.median / two.seconds.median


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("base", type=Path, help=".npy of float vectors [n, dim]")
    parser.add_argument("queries", type=Path, help="the same of queries, at least 100")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    base, queries = unit(np.load(arguments.base)), unit(np.load(arguments.queries))
    lengths = LENGTHS ** np.random.default_rng(1).random((len(base), 1), dtype=np.float32)
    unit_data, long_data = Data.of(base, queries), Data.of(base * lengths, queries)
    rows = []
    for bits in BITS:
        rows.append(kinds(unit_data, long_data, bits))
        print(rows[-1], flush=True)
    if arguments.json:
        document = {
            "machine": machine.describe(),
            "vectors": list(base.shape),
            "queries": len(queries),
            "k": K,
            "lengths": LENGTHS,
            "sample": SAMPLE,
            "rows": rows,
            "lists": in_lists(unit_data),
        }
        text = json.dumps(document, indent=2) + "\n"
        arguments.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
