"""Models that compute what another computes, but carry what breaks key quantizers."""

import copy
from random import Random

import torch
from transformers import PreTrainedModel


@torch.no_grad()
def with_outlier_channels(
    model: PreTrainedModel, *, pairs: int = 3, low: float = 6.0, high: float = 14.0, seed: int = 0
) -> PreTrainedModel:
    """A copy whose key channels are scaled up, and the query channels they meet down.

    Outlier channels of this kind are what real models have after RoPE. Both channels of a RoPE
    pair get the same factor, so that rotation commutes with it and every logit stays the same.

    Args:
        model: A Llama, whose RoPE pairs are channels i and i + head_dim/2.
        pairs: Pairs scaled in every key head.
        low: Smallest factor.
        high: Largest factor.
        seed: Chooses pairs and factors.

    Returns:
        A model with the same output up to rounding.
    """
    hard, random = copy.deepcopy(model), Random(seed)
    config = hard.config
    kv_heads, half = config.num_key_value_heads, config.head_dim // 2
    groups = config.num_attention_heads // kv_heads
    for layer in hard.model.layers:
        # [heads, head_dim, hidden]
        keys = layer.self_attn.k_proj.weight.view(-1, 2 * half, config.hidden_size)
        queries = layer.self_attn.q_proj.weight.view(-1, 2 * half, config.hidden_size)
        for head in range(kv_heads):
            for channel in random.sample(range(half), pairs):
                factor = random.uniform(low, high)
                pair = [channel, channel + half]
                keys[head, pair] *= factor
                queries[head * groups : (head + 1) * groups, pair] /= factor
    return hard
