"""Sixfold and its peers on the embedded model, plain and hard: ``python -m benchmarks.evaluate``.

    python -m benchmarks.evaluate --directory DIR --file TEXT    # on a model of your own

Perplexity, KL to the uncompressed model, true bytes and needles found of every cache, as tables for
docs/evaluation.md. Where bytes are counted the models run in 16 bits, in which KV caches are kept,
so that scales and windows have the bytes they have in practice.
"""

import argparse
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from benchmarks.hard import harden
from benchmarks.needle_table import needles
from sixfold import TurboQuantCache
from sixfold.errors import SixfoldError
from sixfold.eval import machine
from sixfold.eval.caches import MakeCache, compressed
from sixfold.eval.embedded import haystack, load_embedded
from sixfold.eval.long_context import bits_per_value
from sixfold.eval.peers import ALL, PEERS, peer_caches
from sixfold.eval.peers.cache import PeerCache
from sixfold.eval.perplexity import compare_caches, windows_of
from sixfold.integrations.transformers.config import uncompressed_shapes
from sixfold.integrations.transformers.summary import LONG_CONTEXT

BITS = (4, 3.5, 3, 2.5, 2)
PARTS = ("caches", "needles")
DTYPES = ("float16", "bfloat16")
CHUNK = 64
DETECTION_TOKENS = 1500
# Everything in codes, as in peers that keep no tokens in full precision.
NO_WINDOWS = {"sink_tokens": 0, "recent_window": 0}

Variants = dict[str, tuple[float, dict[str, Any]]]


def variants() -> Variants:
    """Sixfold's rows: width and options of each."""
    rows: Variants = {}
    for bits in BITS:
        rows[f"**sixfold {bits:g}**"] = (bits, {})
        rows[f"**sixfold {bits:g}**, no windows"] = (bits, NO_WINDOWS)
    return rows


def plain_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The embedded model, in float16."""
    return load_embedded(torch.float16)


def hard_model(
    dtype: torch.dtype = torch.float16,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Its hard variant, made in float32: line breaks are massive."""
    model, tokenizer = load_embedded()
    ids = torch.tensor(tokenizer(haystack(), verbose=False)["input_ids"])
    line_break = tokenizer("\n")["input_ids"][-1]
    hard = harden(model, ids[:DETECTION_TOKENS], [line_break])
    module: torch.nn.Module = hard
    module.to(dtype)
    return hard, tokenizer


@dataclass(frozen=True, slots=True)
class Subject:
    """What is evaluated: a model, and text that it reads."""

    title: str
    load: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]
    text: Callable[[], str] = haystack


MODELS = {
    "embedded": Subject("The embedded model", plain_model),
    "hard": Subject("Its hard variant", hard_model),
}


def directory(path: Path, text: Path, dtype: torch.dtype = torch.float16) -> Subject:
    """A model saved by transformers, and a file that it reads."""

    def load() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        # Not cast afterwards: rotary frequencies stay in float32 so.
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        return model.eval(), AutoTokenizer.from_pretrained(path)

    return Subject(path.name, load, partial(text.read_text, encoding="utf-8"))


def fitting_peers(model: PreTrainedModel) -> dict[str, MakeCache]:
    """All peers but those whose blocks do not fit the model's heads."""
    (shape, *_) = uncompressed_shapes(model.config)
    keys, values = (
        torch.randn(1, shape.kv_heads, 256, dim) for dim in (shape.key_dim, shape.value_dim)
    )
    found = {}
    for name, make in peer_caches([ALL]).items():
        with suppress(SixfoldError):
            make(model).update(keys, values, 0)
            found[name] = make
    return found


def long_bits(config: PreTrainedConfig) -> dict[str, float]:
    """Bits every cache holds a value once there are `LONG_CONTEXT` tokens, everything counted."""
    peers = {name: bits_per_value(config, PeerCache(config, *PEERS[name])) for name in PEERS}
    return peers | {name: bits_held(config, *variant) for name, variant in variants().items()}


def bits_held(config: PreTrainedConfig, bits: float, options: dict[str, Any]) -> float:
    """Bits a value of `TurboQuantCache(config, bits, **options)` at `LONG_CONTEXT` tokens."""
    return bits_per_value(config, TurboQuantCache(config, bits, **options))


def find_needles(subject: Subject) -> dict[str, Any]:
    """Needles found through our caches and through peers of their size."""
    model, tokenizer = subject.load()
    held = long_bits(model.config)
    return needles(subject.title, model.float(), tokenizer, variants(), held, _dots)


def evaluate(subject: Subject, windows: int, tokens: int) -> dict[str, Any]:
    """Every cache on one model, as the document of its results."""
    model, tokenizer = subject.load()
    caches: dict[str, MakeCache] = {
        row: compressed(bits, **options) for row, (bits, options) in variants().items()
    }
    peers = fitting_peers(model)
    bits = long_bits(model.config)
    ids = windows_of(tokenizer, subject.text(), tokens, windows)
    found = compare_caches(
        model, ids, caches | peers, prefill=tokens // 2, chunk=CHUNK, progress=_dots
    )
    rows = [
        {"cache": row, "bits_long": bits[row], **result.to_dict()} for row, result in found.items()
    ]
    return {
        "model": subject.title,
        "dtype": str(model.dtype).removeprefix("torch."),
        "machine": machine.describe(),
        "windows": list(ids.shape),
        "chunk": CHUNK,
        "long_context": LONG_CONTEXT,
        "left_out": [name for name in PEERS if name not in peers],
        "rows": sorted(rows, key=lambda row: -row["bits_long"]),
    }


def _dots(done: int, total: int, name: str) -> None:
    print(f"\r{done} of {total}", end="\n" if done == total else "", flush=True)


def main() -> None:
    """Measure every cache on the chosen models; print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--directory", type=Path, help="a model saved by transformers, instead")
    parser.add_argument("--file", type=Path, help="text for it")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of that model")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--windows", type=int, default=8, help="at most")
    parser.add_argument("--tokens", type=int, default=768, help="of a window")
    parser.add_argument("--out", type=Path, help="folder of the JSON files, two a model")
    arguments = parser.parse_args()
    if (arguments.directory is None) != (arguments.file is None):
        parser.error("--directory and --file belong together: a model, and text that it reads")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    subjects = {name: MODELS[name] for name in arguments.models}
    if arguments.directory is not None:
        dtype = getattr(torch, arguments.dtype)
        own = directory(arguments.directory, arguments.file, dtype)
        subjects = {arguments.directory.name: own}
    for name, subject in subjects.items():
        print(subject.title)
        if "caches" in arguments.parts:
            document = evaluate(subject, arguments.windows, arguments.tokens)
            for row in document["rows"]:
                print(f"{row['cache']:32} {row['bits_long']:6.2f} bits  KL {row['kl']['mean']:.5f}")
            _write(arguments.out, f"eval_{name}.json", document)
        if "needles" in arguments.parts and subject.text is haystack:
            document = find_needles(subject)
            for row in document["rows"]:
                print(f"{row['cache']:32} {row['bits_long']:6.2f} bits  {row['exact']}")
            _write(arguments.out, f"needles_{name}.json", document)


def _write(folder: Path | None, name: str, document: dict[str, Any]) -> None:
    if folder is not None:
        text = json.dumps(document, indent=2, allow_nan=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
