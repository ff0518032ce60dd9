"""Needles that Sixfold and its peers find, by length of the document: a part of `evaluate`."""

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sixfold.eval import machine
from sixfold.eval.caches import MakeCache, compressed, uncompressed
from sixfold.eval.embedded import haystack
from sixfold.eval.niah import Retrieval, retrieve
from sixfold.eval.peers import peer_caches
from sixfold.eval.progress import Progress

LENGTHS = (256, 512, 1024, 2048)
NEEDLES, DOCUMENTS = 8, 12
# Those that hold about as much as one of ours.
PEERS = (
    *("q4_0-rotated", "vllm-4bit_nc", "turboquant-3.5"),
    *("vllm-3bit_nc", "kivi-2", "turboquant-2.5", "quanto-2"),
)
PLAIN = "uncompressed"


def needles(
    title: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ours: dict[str, tuple[float, dict[str, Any]]],
    held: dict[str, float],
    progress: Progress,
) -> dict[str, Any]:
    """The document of results.

    Args:
        title: What the model is called.
        model: It, in float32: no byte is measured here, and the CPU is faster so.
        tokenizer: Its tokenizer.
        ours: Width and options of Sixfold's rows.
        held: Bits that each cache holds a value of a long context.
        progress: Called after every document and cache.
    """
    caches: dict[str, MakeCache] = {PLAIN: uncompressed}
    caches |= {name: compressed(bits, **options) for name, (bits, options) in ours.items()}
    found = retrieve(
        model,
        tokenizer,
        haystack(),
        caches | peer_caches(PEERS),
        lengths=LENGTHS,
        depths=[index / (NEEDLES - 1) for index in range(NEEDLES)],
        documents=DOCUMENTS,
        forced=True,
        progress=progress,
    )
    rows = [_row(name, one, ({PLAIN: 16.0} | held)[name]) for name, one in found.items()]
    return {
        "model": title,
        "machine": machine.describe(),
        "needles": NEEDLES,
        "documents": DOCUMENTS,
        "rows": sorted(rows, key=lambda row: -row["bits_long"]),
    }


def _row(name: str, found: Retrieval, bits: float) -> dict[str, Any]:
    by_length = {
        length: [cell for cell in found.cells if cell.tokens == length] for length in LENGTHS
    }
    return {
        "cache": name,
        "bits_long": bits,
        "asked": {n: sum(cell.asked for cell in cells) for n, cells in by_length.items()},
        "exact": {n: sum(cell.exact for cell in cells) for n, cells in by_length.items()},
    }
