"""Measure everything in docs/reproduction.md: ``python -m benchmarks.reproduction --json FILE``.

Product quantization and RaBitQ take part where faiss can be imported (``pip install faiss-cpu``).
With ``--sections`` the others stay in the file as they are.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.machine import torch_threads
from benchmarks.reproduction import algorithms, faiss_peer, indexing, kv_codes, recall

Section = dict[str, Any]
SECTIONS: dict[str, Callable[[], Section]] = {
    "mse": algorithms.mse,
    "prod": algorithms.prod,
    "bias": algorithms.bias,
    "crossover": algorithms.crossover,
    "bits": kv_codes.bits,
    "codebook": kv_codes.codebook,
    "polar": kv_codes.polar,
    "qjl": kv_codes.qjl,
    "indexing": indexing.indexing,
    "recall": recall.recall,
}


def measure(names: Sequence[str]) -> dict[str, Any]:
    """The document of results, section by section."""
    if faiss_peer.FAISS is None:
        print("faiss is not installed: rows of product quantization and RaBitQ are left out")
    found = {}
    for name in names:
        found[name] = SECTIONS[name]()
        print(f"{name}: {len(found[name]['rows'])} rows", flush=True)
    return {"machine": machine.describe(), "faiss": faiss_peer.version(), "sections": found}


def main() -> None:
    """Measure the chosen sections; write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--threads", type=int, default=2, help="indexing times have their own")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with torch_threads(arguments.threads):
        document = measure(arguments.sections)
    if arguments.json and arguments.json.exists():
        before = json.loads(arguments.json.read_text(encoding="utf-8"))["sections"]
        document["sections"] = {**before, **document["sections"]}
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    if arguments.json:
        arguments.json.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
