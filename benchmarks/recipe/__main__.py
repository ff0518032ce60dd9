"""Measure every study: ``python -m benchmarks.recipe --json docs/results/recipe.json``.

Studies run side by side, a process of one thread each; results do not depend on how many.
"""

import argparse
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.recipe.measure import CHUNK, NEEDLE_TOKENS, TOKENS, measure
from benchmarks.recipe.studies import STUDIES
from sixfold.eval import machine
from sixfold.integrations.transformers.summary import LONG_CONTEXT


def main() -> None:
    """Measure the chosen studies; print and write their rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", nargs="+", choices=list(STUDIES), default=list(STUDIES))
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="studies not chosen keep the rows it holds")
    arguments = parser.parse_args()
    rows: dict[str, list[dict[str, Any]]] = {study: [] for study in arguments.studies}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, mp_context=spawn) as pool:
        jobs = [(study, name) for study in rows for name in STUDIES[study].models]
        # The long ones first.
        jobs.sort(key=lambda job: not STUDIES[job[0]].needles)
        for (study, _), done in zip(jobs, pool.map(measure, *zip(*jobs, strict=True)), strict=True):
            rows[study] += done
            for row in done:
                kl = f"KL {row['kl']['mean']:.5f}" if "kl" in row else ""
                print(study, row["model"], f"{row['bits']:g}", row["case"], kl, flush=True)
            if arguments.json:
                _write(arguments.json, rows)


def _write(path: Path, rows: dict[str, list[dict[str, Any]]]) -> None:
    held = json.loads(path.read_text(encoding="utf-8"))["sections"] if path.exists() else {}
    shared = {"window_tokens": TOKENS, "chunk": CHUNK, "needle_tokens": NEEDLE_TOKENS}
    held |= {study: {**shared, "rows": found} for study, found in rows.items() if found}
    document = {
        "machine": machine.describe(),
        "long_context": LONG_CONTEXT,
        "sections": {name: held[name] for name in STUDIES if name in held},
    }
    path.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
