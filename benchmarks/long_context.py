"""A million tokens: filled, attended, cropped: ``python -m benchmarks.long_context --json FILE``.

One attention layer of Llama 3's shape at several widths. Random keys and values arrive in chunks,
so that nothing of the size of the context exists in full precision; a float64 oracle attends to
every chunk as it passes. A few needles are hidden: keys that one query each is looking for.
"""

import argparse
import json
import math
import resource
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.machine import torch_threads
from sixfold.cache import CachePolicy, CompressedLayer
from sixfold.eval import timing
from sixfold.packing import Bits

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
GROUP = HEADS // KV_HEADS
SCALING = HEAD_DIM**-0.5
TOKENS, CHUNK = 1_000_000, 16_384
WIDTHS: tuple[Bits, ...] = (4, 3.5, 3, 2.5)
DEPTHS = (0.1, 0.45, 0.9)
# A needle outweighs all other tokens together by so many nats.
MARGIN = 4.0
STEPS = 9


@dataclass
class Oracle:
    """Exact attention of all queries in float64, a chunk at a time."""

    queries: Tensor  # [kv_heads, needles * group, dim]
    weight: Tensor = field(init=False)
    output: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.weight = torch.full(self.queries.shape[:2], -math.inf, dtype=torch.float64)
        self.output = torch.zeros_like(self.queries)

    def see(self, keys: Tensor, values: Tensor) -> None:
        """Attend to one more chunk [1, kv_heads, tokens, dim]."""
        logits = self.queries @ keys[0].double().mT * SCALING
        weight = logits.logsumexp(-1)
        output = (logits - weight[..., None]).exp() @ values[0].double()
        total = torch.logaddexp(self.weight, weight)
        for part, share in ((self.output, self.weight - total), (output, weight - total)):
            part *= share.exp()[..., None]
        self.output, self.weight = self.output + output, total

    def result(self) -> Tensor:
        """Outputs [needles, heads, dim]."""
        by_needle = self.output.view(KV_HEADS, len(DEPTHS), GROUP, HEAD_DIM)
        return by_needle.transpose(0, 1).flatten(1, 2)


@dataclass(frozen=True)
class Text:
    """What is written into the caches: noise, and one needle for every depth.

    Attributes:
        tokens: Tokens in all.
        queries: [needles, heads, dim], one direction a KV head, noise around it.
        needles: Values to find [needles, kv_heads, dim].
    """

    tokens: int
    queries: Tensor
    needles: Tensor

    @classmethod
    def make(cls, tokens: int) -> "Text":
        """Draw queries and needles."""
        random = torch.Generator().manual_seed(0)
        size = len(DEPTHS), KV_HEADS, 1, HEAD_DIM
        shared = torch.randn(size, generator=random)
        own = torch.randn(len(DEPTHS), KV_HEADS, GROUP, HEAD_DIM, generator=random)
        queries = (0.9 * shared + math.sqrt(1 - 0.9**2) * own).flatten(1, 2)
        needles = torch.randn(len(DEPTHS), KV_HEADS, HEAD_DIM, generator=random)
        return cls(tokens, queries.bfloat16(), needles.bfloat16())

    def chunk(self, start: int) -> tuple[Tensor, Tensor]:
        """Keys and values [1, kv_heads, up to CHUNK, dim] from `start` on, and their needles."""
        count = min(CHUNK, self.tokens - start)
        random = torch.Generator().manual_seed(1 + start)
        made = torch.randn(2, 1, KV_HEADS, count, HEAD_DIM, generator=random).bfloat16()
        keys, values = made
        for index, depth in enumerate(DEPTHS):
            where = int(depth * self.tokens) - start
            if 0 <= where < count:
                keys[0, :, where] = self._needle_keys(index)
                values[0, :, where] = self.needles[index]
        return keys, values

    def _needle_keys(self, index: int) -> Tensor:
        """Keys whose logits exceed those of all other tokens together.

        The others' are Gaussian of unit variance: together ln(tokens) + 1/2.
        """
        queries = self.queries[index].float().view(KV_HEADS, GROUP, HEAD_DIM)
        mean = queries.mean(1)
        # The least logit of the group reaches the margin.
        least = (queries @ mean[..., None]).amin(1) * SCALING
        keys: Tensor = mean * (math.log(self.tokens) + 0.5 + MARGIN) / least
        return keys


def fill(text: Text, layers: Sequence[CompressedLayer]) -> tuple[Tensor, Tensor, list[float]]:
    """Write all chunks into all layers.

    Returns:
        The oracle's outputs after half of the tokens and after all, and seconds of every layer.
    """
    queries = text.queries.double().view(len(DEPTHS), KV_HEADS, GROUP, HEAD_DIM)
    oracle = Oracle(queries.transpose(0, 1).flatten(1, 2))
    seconds, half = [0.0] * len(layers), None
    for start in range(0, text.tokens, CHUNK):
        keys, values = text.chunk(start)
        for index, layer in enumerate(layers):
            seconds[index] += timing.time_once(partial(_write, layer, keys, values))
        rest = text.tokens // 2 - start
        if 0 < rest <= keys.shape[2]:
            oracle.see(keys[:, :, :rest], values[:, :, :rest])
            half = oracle.result()
            keys, values = keys[:, :, rest:], values[:, :, rest:]
        if keys.shape[2]:
            oracle.see(keys, values)
    assert half is not None
    return half, oracle.result(), seconds


def _write(layer: CompressedLayer, keys: Tensor, values: Tensor) -> None:
    layer.append(keys, values)
    layer.compress()


def attend(layer: CompressedLayer, query: Tensor) -> Tensor:
    """One decode step on a fork, of a token with neither key nor value."""
    # A key of zeros weighs what an average token weighs: the oracle does without.
    silent = torch.zeros(1, KV_HEADS, 1, HEAD_DIM, dtype=query.dtype)
    twin = layer.fork()
    twin.append(silent, silent)
    return twin.attend(query[None, :, None], scaling=SCALING)[0, :, 0]


def check(layer: CompressedLayer, text: Text, exact: Tensor, remaining: float) -> dict[str, Any]:
    """Errors against the oracle, and against the needles that are still there."""
    found = torch.stack([attend(layer, query) for query in text.queries]).double()
    wanted = text.needles.double().repeat_interleave(GROUP, 1)
    kept = [index for index, depth in enumerate(DEPTHS) if depth < remaining]
    gone = [index for index, depth in enumerate(DEPTHS) if depth >= remaining]
    cosine = torch.nn.functional.cosine_similarity(found, wanted, dim=-1)
    return {
        "error": timing.relative_error(found[kept], exact[kept]),
        "needles": len(kept),
        "needle_cosine": float(cosine[kept].min()),
        "gone_cosine": float(cosine[gone].max()) if gone else None,
    }


def measure(tokens: int, widths: Sequence[Bits], steps: int, bandwidth: float) -> dict[str, Any]:
    """Fill, attend, crop to half, attend again: a row for every width."""
    text = Text.make(tokens)
    shape = torch.empty(1, KV_HEADS, 0, HEAD_DIM, dtype=torch.bfloat16)
    layers = [CompressedLayer(shape, shape, CachePolicy.spending(bits)) for bits in widths]
    half, whole, seconds = fill(text, layers)
    plain = 2 * 2 * KV_HEADS * HEAD_DIM * tokens
    rows = []
    for bits, layer, filling in zip(widths, layers, seconds, strict=True):
        step = timing.Contender("step", partial(attend, layer, text.queries[0]))
        (timed,) = timing.measure(timing.Case([step]), repeats=steps)
        row: dict[str, Any] = {"bits": bits, "fill_seconds": filling}
        row |= {
            "step_seconds": timed.seconds.median,
            "floor_seconds": _bytes(layer) / bandwidth,
        }
        row |= {"nbytes": _bytes(layer), "whole": check(layer, text, whole, 1.0)}
        layer.crop(tokens - tokens // 2)
        row |= {"half_nbytes": _bytes(layer), "half": check(layer, text, half, 0.5)}
        rows.append(row)
    return {
        "tokens": tokens,
        "plain_nbytes": plain,
        "plain_floor_seconds": plain / bandwidth,
        "read_bandwidth": bandwidth,
        # Of the whole process: all widths at once, one chunk, the oracle, Python and torch.
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "chunk": CHUNK,
        "rows": rows,
    }


def _bytes(layer: CompressedLayer) -> int:
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in layer.tensors()}
    return sum(held.values())


def main() -> None:
    """Measure; print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--bits", type=float, nargs="+", default=WIDTHS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with torch_threads(arguments.threads):
        bandwidth = machine.read_bandwidth(arguments.threads)
        found = measure(arguments.tokens, arguments.bits, STEPS, bandwidth)
        document = {"machine": machine.describe(), **found}
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    print(text)
    if arguments.json:
        arguments.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
