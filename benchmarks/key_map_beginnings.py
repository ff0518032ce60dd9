"""What maps are worth by how much they were fitted to: ``python -m benchmarks.key_map_beginnings``.

A serving engine has one map for all its requests, fitted to the first that it saw. Mean KL to the
uncompressed model in nats, windows and sinks as shipped, with maps fitted to the first tokens of
another text, at 4 bits; ``--model`` measures a checkpoint instead of the embedded model.
"""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.key_map_chunks import maps_of, parser, run
from sixfold import KeyMaps
from sixfold.eval.caches import compressed
from sixfold.eval.perplexity import compare_caches

BITS = 4
BEGINNINGS = (64, 128, 256, 512, 1024, 2048)


def study(model: PreTrainedModel, windows: Tensor) -> list[dict[str, Any]]:
    """A row for each beginning; the last window is what maps are made of."""
    text, scored = windows[-1], windows[:-1]
    maps: dict[str, KeyMaps | None] = {"its own prompt": None}
    for tokens in BEGINNINGS:
        if tokens <= len(text):
            maps[str(tokens)] = maps_of(model, text[:tokens], recent_window=0)
    found = compare_caches(
        model,
        scored,
        {name: compressed(BITS, code="codebook", key_map=given) for name, given in maps.items()},
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


if __name__ == "__main__":
    run(parser(__doc__).parse_args(), study)
