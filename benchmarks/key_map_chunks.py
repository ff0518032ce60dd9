"""How far the key map depends on how a prompt comes in: ``python -m benchmarks.key_map_chunks``.

The same prompts, prefilled in one piece, in short chunks and token by token, into caches that fit
their key maps when they have enough tokens (`fitted`, the default) or to the first there are (`at
once`), and into caches with maps pinned beforehand, taken from another text. Mean KL to the
uncompressed model in nats, windows and sinks as shipped, on the embedded model, plain and with
outlier channels; ``--model`` measures a checkpoint instead.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from benchmarks.hard import with_outlier_channels
from sixfold import KeyMaps, TurboQuantCache
from sixfold.cache.policy import FIT_TOKENS
from sixfold.eval import machine
from sixfold.eval.caches import compressed
from sixfold.eval.embedded import haystack, load_embedded
from sixfold.eval.perplexity import compare_caches, fill, windows_of

BITS = (4, 3, 2)
CHUNKS = (0, 48, 1)  # tokens a forward pass of the prompt; 0: all at once


def maps_of(model: PreTrainedModel, text: Tensor, **options: Any) -> KeyMaps:
    """The maps that a cache of these options fits to `text` [tokens] in one piece."""
    cache = TurboQuantCache.for_model(model, **options)
    fill(model, text, cache)
    return cache.key_maps()


def codes(cache: TurboQuantCache) -> Tensor:
    """Key codes of the first layer, whose keys depend on no chunk, nor on codes."""
    runs = cache.compressed_layers[0].store.history.runs  # type: ignore[union-attr]
    return torch.cat([run.slab.pool.key_codes[run.slots] for run in runs], 1)


def differing(
    model: PreTrainedModel, windows: Tensor, chunk: int, options: dict[str, Any]
) -> float:
    """Share of the bytes of those codes, at 4 bits, that are not what one piece gives."""
    shares = []
    for window in windows:
        caches = [TurboQuantCache.for_model(model, 4, **options) for _ in range(2)]
        fill(model, window, caches[0])
        fill(model, window, caches[1], chunk)
        one, other = map(codes, caches)
        # A sliding window has let go of other pages.
        held = min(one.shape[1], other.shape[1])
        one, other = one[:, -held:], other[:, -held:]
        shares.append(float((one != other).float().mean()))
    return sum(shares) / len(shares)


def study(
    model: PreTrainedModel, windows: Tensor, prefill: int, chunk: int
) -> list[dict[str, Any]]:
    """One way for prompts to come in; the last window is what pinned maps are made of."""
    scored = windows[:-1]
    ways: dict[str, dict[str, Any]] = {
        "fitted": {"fit_tokens": FIT_TOKENS},
        "at once": {"fit_tokens": 0},
        "pinned": {"key_map": maps_of(model, windows[-1])},
    }
    caches = {
        (name, bits): compressed(bits, **options) for name, options in ways.items() for bits in BITS
    }
    found = compare_caches(
        model,
        scored,
        {f"{name} {bits}": make for (name, bits), make in caches.items()},
        prefill=prefill,
        prefill_chunk=chunk or None,
    )
    kl = {pair: found[f"{pair[0]} {pair[1]}"].kl for pair in caches}
    return [
        {
            "chunk": chunk,
            "map": name,
            "differing": differing(model, scored[:, :prefill], chunk, options),
            "kl": {f"{bits}": kl[name, bits].mean for bits in BITS},
            "standard_error": {f"{bits}": kl[name, bits].standard_error for bits in BITS},
        }
        for name, options in ways.items()
    ]


def models(
    paths: list[str], dtype: str
) -> Iterator[tuple[str, PreTrainedModel, PreTrainedTokenizerBase]]:
    """What to measure: name, model and tokenizer."""
    if not paths:
        plain, tokenizer = load_embedded()
        yield "plain", plain, tokenizer
        yield "outliers", with_outlier_channels(plain), tokenizer
    for path in paths:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        yield Path(path).name, model, AutoTokenizer.from_pretrained(path)


def parser(description: str | None) -> argparse.ArgumentParser:
    """What every study of key maps can be told."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument(
        "--model", nargs="+", default=[], help="checkpoints; default: the embedded models"
    )
    made.add_argument("--dtype", default="float32", help="of checkpoints")
    made.add_argument("--file", type=Path, help="text; default: the package's own prose")
    made.add_argument("--windows", type=int, default=8)
    made.add_argument("--tokens", type=int, default=768)
    made.add_argument("--json", type=Path)
    return made


def run(
    arguments: argparse.Namespace, study: Callable[..., Iterable[dict[str, Any]]], spare: int = 1
) -> None:
    """Print the rows that `study` finds for every model and windows, and write them if asked to.

    The last `spare` windows are what it makes maps of.
    """
    text = arguments.file.read_text(encoding="utf-8") if arguments.file else haystack()
    rows = []
    for name, model, tokenizer in models(arguments.model, arguments.dtype):
        windows = windows_of(tokenizer, text, arguments.tokens, arguments.windows)
        for row in study(model, windows):
            rows.append({"model": name, **row})
            print(json.dumps(rows[-1]), flush=True)
    if arguments.json:
        shape = [len(windows) - spare, arguments.tokens]
        document = {"machine": machine.describe(), "windows": shape, "rows": rows}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Measure every way on every model; print and write the table."""
    options = parser(__doc__)
    # Half a window is more than a cache waits for.
    options.set_defaults(tokens=1152, windows=5)
    options.add_argument("--chunks", type=int, nargs="+", default=CHUNKS, help="0: one piece")
    arguments = options.parse_args()

    def ways(model: PreTrainedModel, windows: Tensor) -> Iterator[dict[str, Any]]:
        for chunk in arguments.chunks:
            yield from study(model, windows, arguments.tokens // 2, chunk)

    run(arguments, ways)


if __name__ == "__main__":
    main()
