"""Measure leads to better codes: ``python -m benchmarks.codes plain hard --json FILE``.

    python -m benchmarks.codes DIR --dtype bfloat16 --text BOOK --json FILE    # a model of your own

``plain`` and ``hard`` are the models of `benchmarks.recipe`; a directory is a checkpoint with
projections named as Llama's. Models that are not measured keep the rows that FILE holds.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from benchmarks.codes.leads import Lead, leads
from benchmarks.evaluate import CHUNK, bits_held
from benchmarks.recipe.measure import row_of
from benchmarks.recipe.models import MODELS
from benchmarks.rows import Row, beside
from sixfold.eval import machine
from sixfold.eval.embedded import haystack
from sixfold.eval.perplexity import CacheComparison, compare_caches, windows_of
from sixfold.packing import Bits

WIDTHS: tuple[Bits, ...] = (4, 3, 2.5, 2)


def loaded(name: str, asked: argparse.Namespace) -> tuple[PreTrainedModel, Tensor]:
    """A model, and windows of text that it reads."""
    if name in MODELS:
        (model, tokenizer), text = MODELS[name](), haystack()
    else:
        dtype = getattr(torch, asked.dtype)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval()
        tokenizer, text = AutoTokenizer.from_pretrained(name), asked.text.read_text("utf-8")
    return model, windows_of(tokenizer, text, asked.tokens, asked.windows)


def measure(name: str, asked: argparse.Namespace) -> list[Row]:
    """Every lead of every width on one model."""
    model, windows = loaded(name, asked)
    cases: dict[str, tuple[Bits, Lead]] = {
        f"{bits:g} {lead.label}": (bits, lead) for bits in asked.bits for lead in leads(bits)
    }
    found = compare_caches(
        model,
        windows,
        {case: lead.cache(bits) for case, (bits, lead) in cases.items()},
        prefill=asked.prefill,
        chunk=CHUNK,
        progress=_said,
    )
    first: dict[Bits, CacheComparison] = {}
    rows = []
    for case, (bits, lead) in cases.items():
        held = bits_held(model.config, bits, lead.options)
        base = first.setdefault(bits, found[case])
        rows.append(row_of(Path(name).name, lead.label, bits, held, found[case], base))
    return rows


def _said(done: int, total: int, name: str) -> None:
    if done % 100 == 0:
        print(f"{done} of {total}, the last of {name}", file=sys.stderr, flush=True)


def write(path: Path, rows: list[Row], asked: argparse.Namespace) -> None:
    """Beside the other models that are there already."""
    document = {
        "machine": machine.describe(),
        "window_tokens": asked.tokens,
        "prefill": asked.prefill,
        "chunk": CHUNK,
        "rows": beside(rows, path, "model"),
    }
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--text", type=Path, help="what a checkpoint reads")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--bits", type=float, nargs="+", default=list(WIDTHS))
    parser.add_argument("--tokens", type=int, default=768)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--windows", type=int, default=7)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    for name in asked.models:
        rows = measure(name, asked)
        for row in rows:
            print(row["model"], f"{row['bits']:g}", row["case"], f"KL {row['kl']['mean']:.5f}")
        if asked.json:
            write(asked.json, rows, asked)


if __name__ == "__main__":
    main()
