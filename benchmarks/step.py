"""What one layer of one decode step costs when there is almost nothing to attend: the overhead."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.ours import Options, variants
from sixfold.cache import CachePolicy
from sixfold.eval.timing import Case, Contender
from sixfold.integrations.transformers.attention import attention_forward
from sixfold.integrations.transformers.layer import TurboQuantLayer

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
# Enough that there are codes to attend to; a sample of 64 steps writes one page more.
TOKENS = (192,)
STEPS = 64

Layer = DynamicLayer | TurboQuantLayer


def case(tokens: int, options: Options) -> Case:
    """A cache layer's update and attention, with no model around it."""
    contenders = [
        _steps("transformers DynamicCache, sdpa", DynamicLayer, sdpa_attention_forward, tokens)
    ]
    for bits in options.bits:
        policy = CachePolicy(key_bits=bits, value_bits=bits)

        def make(policy: CachePolicy = policy) -> TurboQuantLayer:
            return TurboQuantLayer(policy, None, fused=True)

        one = _steps(f"sixfold {bits:g} bits", make, attention_forward, tokens)
        contenders.append(replace(one, notes={"bits": bits}))
    return variants("attention", Case(contenders), options)


class AttentionModule(torch.nn.Module):
    """What transformers' sdpa asks of the module it computes for."""

    num_key_value_groups = HEADS // KV_HEADS
    is_causal = True


def _steps(
    name: str, make: Callable[[], Layer], attend: Callable[..., Any], tokens: int
) -> Contender:
    """`STEPS` decode steps of one layer, from a cache of `tokens` tokens every time."""
    module = AttentionModule().eval()
    generator = torch.Generator().manual_seed(tokens)

    def gaussian(heads: int, count: int) -> Tensor:
        return torch.randn(1, heads, count, HEAD_DIM, generator=generator).bfloat16()

    prompt = gaussian(HEADS, tokens), gaussian(KV_HEADS, tokens), gaussian(KV_HEADS, tokens)
    new = gaussian(HEADS, 1), gaussian(KV_HEADS, 1), gaussian(KV_HEADS, 1)
    holder: list[Layer] = []

    @torch.no_grad()
    def step(query: Tensor, keys: Tensor, values: Tensor) -> None:
        held = holder[0].update(keys, values)
        attend(module, query, *held, None, scaling=HEAD_DIM**-0.5)

    def prepare() -> None:
        holder[:] = [make()]
        step(*prompt)

    def run() -> None:
        for _ in range(STEPS):
            step(*new)

    return Contender(name, run, prepare=prepare, steps=STEPS)
