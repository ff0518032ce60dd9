"""The paper's needle grid, 4k to 104k tokens: ``python -m benchmarks.needles --json FILE``.

The embedded model was trained to 2,048 tokens; YaRN stretches its positions, without training. A
document is prefilled once, exactly; every cache is filled with those keys and values and then asked
for the needle of every depth on a fork of its own.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import (
    AttentionInterface,
    Cache,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from benchmarks.machine import torch_threads
from sixfold.eval import machine, plot
from sixfold.eval.caches import (
    MakeCache,
    compressed,
    fork,
    half_precision_bytes,
    held_bytes,
    uncompressed,
)
from sixfold.eval.embedded import haystack, load_embedded
from sixfold.eval.needles import is_exact, split_sentences
from sixfold.eval.niah import Questions, build_questions, greedy, token_count
from sixfold.eval.peers import peer_caches
from sixfold.integrations.transformers.keyword import cache_argument
from sixfold.integrations.transformers.layer import TurboQuantLayer

LENGTHS = (4_000, 6_000, 10_000, 16_000, 26_000, 41_000, 65_000, 104_000)
DEPTHS = tuple(index / 10 for index in range(11))
WIDTHS = (4, 3.5, 3, 2.5, 2, 1)
PEERS = ("q4_0", "vllm-3bit_nc", "kivi-2", "turboquant-2.5", "quanto-2")
TRAINED = 2048
FIRST_CHUNK = 1024
_PREFILL = "benchmarks_prefill"


def yarn_factor(tokens: int) -> float:
    """By how much to stretch positions for documents of `tokens` tokens.

    The least power of two that is twice what trained positions need: just what they need loses
    the needles that are furthest away, and more loses near ones.
    """
    return float(2 ** math.ceil(math.log2(max(2 * tokens / TRAINED, 1))))


def stretch(model: PreTrainedModel, factor: float) -> None:
    """Let the embedded model, trained to 2,048 tokens, count further: YaRN, without training."""
    config = model.config
    config.rope_parameters = {
        "rope_type": "yarn",
        "rope_theta": config.rope_parameters["rope_theta"],
        "factor": factor,
        "original_max_position_embeddings": TRAINED,
    }
    config.max_position_embeddings = int(TRAINED * factor)
    base: Any = model.base_model
    base.rotary_emb = type(base.rotary_emb)(config)


def long_text(sentences: Sequence[str], tokens: int, rng: Random) -> list[str]:
    """The embedded text's sentences again and again, every time in another order."""
    # A sentence has some twenty tokens: more than enough.
    rounds = -(-tokens // (8 * len(sentences)))
    return [one for _ in range(rounds) for one in rng.sample(sentences, len(sentences))]


def _keys_and_values_alone(
    module: Any, query: Tensor, key: Tensor, value: Tensor, _: object, **__: object
) -> tuple[Tensor, None]:
    """Causal attention, but in the last layer, whose output a prefill does not need."""
    if module.layer_idx == module.config.num_hidden_layers - 1:
        return torch.zeros_like(query).transpose(1, 2), None
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    )
    return out.transpose(1, 2), None


@torch.no_grad()
def prefill(model: PreTrainedModel, context: Int[Tensor, " tokens"]) -> DynamicCache:
    """Exact keys and values of every layer."""
    AttentionInterface.register(_PREFILL, _keys_and_values_alone)
    model.set_attn_implementation(_PREFILL)
    cache = DynamicCache(config=model.config)
    model.base_model(input_ids=context[None], **cache_argument(cache), use_cache=True)
    model.set_attn_implementation("sdpa")
    return cache


@torch.no_grad()
def filled(
    model: PreTrainedModel, make: MakeCache, context: Int[Tensor, " tokens"], exact: DynamicCache
) -> Cache:
    """A cache of the context: its first chunk from the model, the rest from `exact`.

    The first chunk goes through the model so that the cache sees queries where it wants to.
    """
    cache = make(model)
    first = context[:FIRST_CHUNK]
    model.base_model(input_ids=first[None], **cache_argument(cache), use_cache=True)
    for index in range(len(exact.layers)):
        layer: Any = exact.layers[index]
        keys, values = (x[:, :, len(first) :] for x in (layer.keys, layer.values))
        if not keys.shape[2]:
            continue
        ours = cache.layers[index]
        if isinstance(ours, TurboQuantLayer) and ours.store is not None:
            ours.store.append(keys, values)
            ours.store.compress()
        else:
            cache.update(keys, values, index)
    return cache


def ask(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Questions, cache: Cache
) -> list[bool]:
    """Whether each needle's number comes back to its last digit."""
    found = []
    for needle, tail in zip(questions.needles, questions.tails, strict=True):
        # One token more than the answer: a number that goes on is a wrong number.
        steps = token_count(tokenizer, needle.answer) + 1
        ids = greedy(model, tail, fork(cache), steps)
        found.append(is_exact(str(tokenizer.decode(ids)), needle))
    return found


def contenders(widths: Sequence[float], peers: Sequence[str]) -> dict[str, MakeCache]:
    """What makes each cache, by the name of its row."""
    ours = {f"sixfold {bits:g}": compressed(bits) for bits in widths}
    return {"uncompressed": uncompressed, **ours, **peer_caches(peers)}


def measure(
    caches: Mapping[str, MakeCache],
    lengths: Sequence[int],
    depths: Sequence[float] = DEPTHS,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """One row a cache: bits held of the longest document, and hits by length and depth."""
    model, tokenizer = load_embedded(torch.bfloat16)
    sentences, rng = split_sentences(haystack()), Random(seed)
    rows = {name: {"cache": name, "bits": 0.0, "found": {}} for name in caches}
    for size in lengths:
        text = long_text(sentences, size, rng)
        questions = build_questions(tokenizer, text, depths, size, rng)
        stretch(model, yarn_factor(size))
        exact = prefill(model, questions.context)
        for name, make in caches.items():
            cache = filled(model, make, questions.context, exact)
            hits = [int(hit) for hit in ask(model, tokenizer, questions, cache)]
            row: dict[str, Any] = rows[name]
            row["found"][str(size)] = hits
            row["bits"] = 16 * held_bytes(cache) / half_precision_bytes(cache)
            print(f"{size:>7} {name:16} {sum(hits)}/{len(hits)}", flush=True)
    return sorted(rows.values(), key=lambda row: -float(row["bits"]))


def draw(document: Mapping[str, Any], path: Path) -> None:
    """A heat map for every cache, context by depth, as in the paper's figure."""
    rows = document["rows"]
    figure, axes = plot.new_figure(len(rows), width=2.4, height=2.2)
    for axis, row in zip(axes, rows, strict=True):
        grid = list(zip(*row["found"].values(), strict=True))
        axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        labels = [f"{int(size) // 1000}k" for size in row["found"]]
        axis.set_xticks(range(len(labels)), labels, fontsize=6, rotation=90)
        axis.set_yticks([0, len(grid) - 1], ["first", "last"], fontsize=6)
        axis.set_title(f"{row['cache']} ({row['bits']:.2f} bits)", fontsize=7, color=plot.INK)
    plot.save(figure, path)


def main() -> None:
    """Measure; print and write the grid."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--bits", type=float, nargs="*", default=WIDTHS)
    parser.add_argument("--against", nargs="*", default=PEERS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    caches = contenders(arguments.bits, arguments.against)
    with torch_threads(arguments.threads):
        rows = measure(caches, arguments.lengths)
    factors = {str(size): yarn_factor(size) for size in arguments.lengths}
    document = {"machine": machine.describe(), "depths": DEPTHS, "factors": factors, "rows": rows}
    if arguments.json:
        text = json.dumps(document, allow_nan=False, indent=1) + "\n"
        arguments.json.write_text(text, encoding="utf-8")
    if arguments.plot:
        draw(document, arguments.plot)


if __name__ == "__main__":
    main()
