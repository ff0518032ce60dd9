"""Writes the golden files of the current format version: `python -m tests.golden.make`.

Only for a new version, before its first release. Files of released versions never change.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from sixfold import TurboQuantCache
from sixfold.io import FORMAT_VERSION

FOLDER = Path(__file__).parent

BATCH, HEADS, TOKENS = 2, 1, 75
PADDING = 6  # of the second sequence


@dataclasses.dataclass(frozen=True)
class Golden:
    """The file of one version: what its layers hold, and how."""

    version: int
    dim: int
    policies: dict[int, dict[str, Any]]

    @property
    def cache(self) -> Path:
        return FOLDER / f"cache-v{self.version}.sixfold"

    @property
    def contents(self) -> Path:
        return FOLDER / f"cache-v{self.version}-contents.safetensors"


GOLDEN = (
    Golden(
        1,
        8,
        {
            0: {"key_bits": 3, "value_bits": 4, "code": "codebook"},
            1: {"key_bits": 2, "value_bits": 1, "code": "codebook"},
        },
    ),
    Golden(
        2,
        32,
        {
            0: {"key_bits": 2.5, "value_bits": 3, "code": "trellis"},
            1: {"key_bits": 2, "value_bits": 4, "code": "codebook"},
        },
    ),
)


def model(golden: Golden) -> PreTrainedModel:
    """A model whose cache the golden file is: full attention, a sliding window, one skipped."""
    config = Qwen2Config(
        vocab_size=8,
        hidden_size=2 * golden.dim,
        intermediate_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=HEADS,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        use_sliding_window=True,
        sliding_window=70,
        max_position_embeddings=128,
    )
    return Qwen2ForCausalLM(config).eval()


def numbers(count: int, seed: int) -> Tensor:
    """Multiples of 2^-13 in [-4, 4) from a linear congruential generator: no library's choice."""
    found, state = [], seed
    for _ in range(count):
        state = (1_664_525 * state + 1_013_904_223) % 2**32
        found.append((state >> 16) - 2**15)
    return torch.tensor(found, dtype=torch.float32) / 2**13


def tokens(layer: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values; the last key is huge, the last value zero."""
    count = BATCH * HEADS * TOKENS * dim
    query = numbers(2 * count, 7 + layer).view(BATCH, 2 * HEADS, TOKENS, dim)
    keys = numbers(count, 17 + layer).view(BATCH, HEADS, TOKENS, dim)
    values = numbers(count, 27 + layer).view(BATCH, HEADS, TOKENS, dim)
    keys[:, :, 40] *= 1e6
    values[:, :, 41] = 0
    return query.bfloat16(), keys.bfloat16(), values.bfloat16()


def mask(sliding_window: int | None) -> Tensor:
    """Causal, the second sequence left-padded."""
    own, all_ = torch.arange(TOKENS)[:, None], torch.arange(TOKENS)
    seen = all_ <= own
    if sliding_window is not None:
        seen = seen & (all_ > own - sliding_window)
    return seen & (all_ >= torch.tensor([0, PADDING])[:, None, None, None])


def filled(golden: Golden) -> TurboQuantCache:
    """The cache that the golden file holds."""
    cache = TurboQuantCache(
        model(golden).config,
        recent_window=0,
        skip_layers=[2],
        per_layer=golden.policies,
        seed=11,
    )
    for index, layer in enumerate(cache.layers):
        query, keys, values = tokens(index, golden.dim)
        if index == 2:
            layer.update(keys, values)
            continue
        layer.lazy_initialization(keys, values)
        layer.store.append(keys, values)
        layer.store.attend(query, scaling=golden.dim**-0.5, mask=mask(layer.sliding_window))
        # Cut a page, so that one is partly valid.
        if index == 0:
            layer.store.crop(20)
            layer.store.append(keys[:, :, -20:], values[:, :, -20:])
    return cache


def contents(cache: TurboQuantCache) -> dict[str, Tensor]:
    """What every layer decodes to."""
    found = {}
    for index, layer in enumerate(cache.compressed_layers):
        assert layer.store is not None
        found[f"{index}.keys"], found[f"{index}.values"] = layer.store.dequantized()
    return found


if __name__ == "__main__":
    newest = GOLDEN[-1]
    assert newest.version == FORMAT_VERSION
    filled(newest).save(newest.cache)
    save_file(contents(filled(newest)), newest.contents)
