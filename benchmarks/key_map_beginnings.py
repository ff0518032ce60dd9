"""What maps are worth by how much they were fitted to: ``python -m benchmarks.key_map_beginnings``.

A serving engine has one map for all its requests, fitted to the first that it saw. Mean KL to the
uncompressed model in nats, windows and sinks as shipped, with maps fitted to the first tokens of
an``--model`` measures a checkpoint instead of the embedded model.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.key_map_chunks import models
from sixfold import KeyMaps, TurboQuantCache
from sixfold.eval import machine
from sixfold.eval.caches import compressed
from sixfold.eval.embedded import haystack
from sixfold.eval.perplexity import compare_caches, fill, windows_of

BITS = 4
BEGINNINGS = (64, 128, 256, 512, 1024, 2048)


def maps_of(model: PreTrainedModel, text: Tensor) -> KeyMaps:
    """The maps that a cache fits to `text` [tokens], however short, in one piece."""
    cache = TurboQuantCache.for_model(model, recent_window=0)
    fill(model, text, cache)
    return cache.key_maps()


def study(model: PreTrainedModel, windows: Tensor) -> list[dict[str, Any]]:
    """A row for each beginning; the last window is what maps are made of."""
    text, scored = windows[-1], windows[:-1]
    maps: dict[str, KeyMaps | None] = {"its own prompt": None}
    for tokens in BEGINNINGS:
        if tokens <= len(text):
            maps[str(tokens)] = maps_of(model, text[:tokens])
    found = compare_caches(
        model,
        scored,
        {name: compressed(BITS, key_map=given) for name, given in maps.items()},
        prefill=windows.shape[1] // 2,
    )
    return [
        {
            "fitted to": name,
            "kl": found[name].kl.mean,
            "standard_error": found[name].kl.standard_error,
        }
        for name in maps
    ]


def main() -> None:
    """Measure every beginning on every model; print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a checkpoint's folder; default: the embedded models")
    parser.add_argument("--file", type=Path, help="text; default: the package's own prose")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=768)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    chosen, tokenizer = models(arguments.model)
    text = arguments.file.read_text(encoding="utf-8") if arguments.file else haystack()
    windows = windows_of(tokenizer, text, arguments.tokens, arguments.windows)
    rows = []
    for name, model in chosen.items():
        for row in study(model, windows):
            rows.append({"model": name, **row})
            print(json.dumps(rows[-1]), flush=True)
    if arguments.json:
        shape = [len(windows) - 1, arguments.tokens]
        document = {"machine": machine.describe(), "windows": shape, "rows": rows}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
