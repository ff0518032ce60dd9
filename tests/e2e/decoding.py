"""One left-padded batch, decoded step by step through any cache."""

import dataclasses
import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from sixfold import TurboQuantCache
from sixfold.integrations.transformers.keyword import cache_argument
from sixfold.packing import Bits
from tests.e2e.models import ARCHITECTURES, VOCAB, tiny_model

# Three pages and 56 tokens, the first page of the last sequence all padding. The eighth decoded
# token completes a page; where a window of `models.WINDOW` slides, the ninth does.
PROMPTS = (248, 203, 150)
STEPS = 24


@dataclasses.dataclass(frozen=True)
class Batch:
    """Token ids, padding mask and positions of a left-padded batch with its continuation."""

    ids: Tensor
    mask: Tensor
    prompt: int

    @property
    def positions(self) -> Tensor:
        """Position of every token within its own sequence."""
        return (self.mask.cumsum(1) - 1).clamp(min=0)


def batch(prompts: Sequence[int] = PROMPTS, steps: int = STEPS, seed: int = 1) -> Batch:
    """Random sequences of these prompt lengths, left-padded, with `steps` tokens to follow.

    Fewer steps give the beginning of the same sequences.
    """
    generator = torch.Generator().manual_seed(seed)
    longest = max(prompts)
    ids = torch.randint(2, VOCAB, (longest + STEPS, len(prompts)), generator=generator).T
    ids = ids[:, : longest + steps]
    padding = torch.arange(longest + steps) < longest - torch.tensor(prompts)[:, None]
    return Batch(ids.masked_fill(padding, 0), (~padding).long(), longest)


def expected_warning(name: str) -> AbstractContextManager[Any]:
    """Where `for_model` dequantizes it warns, and nowhere else."""
    dequantized = ARCHITECTURES[name].dequantized
    return pytest.warns(UserWarning, match="dequantized") if dequantized else nullcontext()


def fused_cache(name: str, bits: Bits = 8, **options: Any) -> TurboQuantCache:
    """`for_model` of the tiny model called `name`."""
    with expected_warning(name):
        return TurboQuantCache.for_model(tiny_model(name), bits, **options)


@torch.no_grad()
def forward(model: PreTrainedModel, cache: Cache, data: Batch, start: int, stop: int) -> Tensor:
    """Logits of the tokens from `start` to `stop`, which enter the cache."""
    return model(
        data.ids[:, start:stop],
        attention_mask=data.mask[:, :stop],
        position_ids=data.positions[:, start:stop],
        **cache_argument(cache),
        use_cache=True,
    ).logits


def decode(model: PreTrainedModel, cache: Cache, data: Batch) -> Tensor:
    """Logits of the continuation, a token at a time, after a prefill in one chunk."""
    forward(model, cache, data, 0, data.prompt)
    return continue_decoding(model, cache, data)


def continue_decoding(model: PreTrainedModel, cache: Cache, data: Batch) -> Tensor:
    """Logits of the continuation through a cache that holds the prompt."""
    steps = range(data.prompt, data.ids.shape[1])
    return torch.cat([forward(model, cache, data, i, i + 1) for i in steps], 1)


@functools.cache
def uncompressed_logits(name: str) -> Tensor:
    """What the model called `name` says through transformers' own cache and eager attention."""
    model = tiny_model(name)
    return decode(model, DynamicCache(config=model.config), batch())


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference ÷ norm of what was expected."""
    actual, expected = actual.float(), expected.float()
    return float((actual - expected).norm() / expected.norm())
