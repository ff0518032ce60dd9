"""Models that compute what another computes, but carry what breaks key-value quantizers.

`harden` puts three things into a Llama that real models have: outlier channels, a key mean that
dwarfs what tells keys apart (Qwen2.5), and a few tokens of massive activations. Attention stays
exactly what it was, in exact arithmetic; what differs is rounding.
"""

import copy
import math
from collections.abc import Sequence
from random import Random
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from sixfold.errors import SixfoldError

# Makes the frequency of a RoPE pair zero, to float32.
_NO_ROTATION = 1e30


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


def harden(
    model: PreTrainedModel, ids: Int[Tensor, " tokens"], massive_tokens: Sequence[int]
) -> PreTrainedModel:
    """All of it: outlier channels, a shared key mean and massive tokens.

    Args:
        model: A Llama without attention biases, of even head_dim.
        ids: Text by which the massive tokens are told from others.
        massive_tokens: Ids of tokens to make massive, delimiters for instance.

    Returns:
        A model of twice the head_dim with the same output up to rounding.

    Raises:
        SixfoldError: The text holds none of these tokens.
    """
    return with_hidden_channels(with_outlier_channels(model), ids, massive_tokens)


@torch.no_grad()
def with_hidden_channels(
    model: PreTrainedModel,
    ids: Int[Tensor, " tokens"],
    massive_tokens: Sequence[int],
    *,
    mean: float = 10.0,
    massive: float = 10.0,
    first_mean: float | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """A copy with twice the channels a head, whose new ones add nothing to any softmax.

    RoPE does not turn the new channels (`rope_type="longrope"`, frequencies zero), and they come
    in twos that see the same query q. Keys hold there

    - a bias β, large and the same for all tokens: it adds q·β to all logits of a query alike;
    - x and -x, from copies of what the old channels hold: it adds q·(x - x) = 0;
    - g and -g, where g is large for massive tokens: likewise.

    Values are stored twice, with +g and -g in one channel, and the output projection takes their
    mean. Exact are thus all probabilities and outputs, for every position; not exact is the
    rounding of sums with large terms, about |β|·2⁻²⁴ of a logit in float32. The queries of new
    channels are alive, as in real models: a quantizer that errs there errs in the logits.

    Args:
        model: See `harden`.
        ids: See `harden`.
        massive_tokens: See `harden`.
        mean: Norm of the key mean over that of a typical key.
        massive: g of a massive token over the root mean square of a key's coordinates.
        first_mean: `mean` of the first layer, in Qwen2.5 sixty. With it RoPE turns every other two
            of new channels, by one frequency each, and β has opposite signs in the channels of
            such a two: what it adds cancels at every position, as q·β would not.
        seed: Chooses the mean and the channels.

    Returns:
        See `harden`.

    Raises:
        SixfoldError: The text holds none of these tokens.
    """
    detectors = _detectors(model, ids, massive_tokens)
    turned = first_mean is not None
    hard = _widened(model, turned)
    generator = torch.Generator().manual_seed(seed)
    means = [mean] * len(detectors)
    if first_mean is not None:
        means[0] = first_mean
    layers = zip(model.model.layers, hard.model.layers, detectors, means, strict=True)
    for old, new, detector, own in layers:
        _hide(old.self_attn, new.self_attn, detector, own, massive, turned, generator)
    # As a plain module: transformers wraps `to` in a type that hides its argument.
    module: nn.Module = hard
    module.to(model.dtype).eval()
    return hard


def _widened(model: PreTrainedModel, turned: bool) -> PreTrainedModel:
    """The same model with room for the new channels, in float32."""
    config = copy.deepcopy(model.config)
    pairs, length = config.head_dim // 2, config.max_position_embeddings
    factors = [1.0, _NO_ROTATION] * pairs
    if turned:
        theta = config.rope_parameters["rope_theta"]
        for pair in range(pairs):
            if pair % 4 < 2:
                # Both pairs of a two turn alike, as one of the slowest old pairs does.
                own, wanted = 2 * pair + 1, 2 * (pairs - 1 - pair // 4)
                factors[own] = theta ** ((wanted - own) / config.head_dim)
    config.head_dim *= 2
    config.attention_bias = True
    config.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": model.config.rope_parameters["rope_theta"],
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": length,
    }
    wide: PreTrainedModel = type(model)(config)
    state = {k: v for k, v in model.state_dict().items() if ".self_attn." not in k}
    wide.load_state_dict(state, strict=False)
    return wide


def _offset(
    keys: Float[Tensor, "heads dim hidden"], mean: float, turned: bool, generator: torch.Generator
) -> Float[Tensor, "heads dim"]:
    """The bias β of the new channels of every key head."""
    dim = keys.shape[1]
    # Heavy tails: most of a real mean is in a few channels.
    offset = torch.randn((len(keys), dim), generator=generator).pow(3)
    if turned:
        # Channels c and c + dim/2 make up a RoPE pair; pairs 4m and 4m + 1 turn alike.
        pairs = offset.unflatten(1, (2, -1, 4))
        pairs[..., 1] = -pairs[..., 0]
    length: Tensor = torch.linalg.vector_norm(offset, dim=1)[:, None]
    return offset * (mean * _typical(keys) * math.sqrt(dim)) / length


def _typical(keys: Float[Tensor, "heads dim hidden"]) -> float:
    """The typical coordinate of a key: RMSNorm leaves inputs of mean square one."""
    return float(keys.square().sum(-1).mean().sqrt())


def _hide(
    old: Any,
    new: Any,
    detector: Float[Tensor, " hidden"],
    mean: float,
    massive: float,
    turned: bool,
    generator: torch.Generator,
) -> None:
    """Fill the projections of one layer."""
    dim = old.head_dim
    queries, keys, values = (
        getattr(old, name).weight.float().unflatten(0, (-1, dim))
        for name in ("q_proj", "k_proj", "v_proj")
    )
    size = massive * _typical(keys)
    spike = torch.zeros(dim, 1).index_fill(0, torch.tensor([0]), size) * detector
    pick = torch.randperm(dim, generator=generator)[: dim // 2]
    # A head of twice the size divides its logits by sqrt(2) more.
    twice = math.sqrt(2) * queries
    _set(new.q_proj, _interleaved(twice, twice[:, pick].repeat_interleave(2, 1)))
    sign = torch.tensor([1.0, -1.0]).repeat(dim // 2)[:, None]
    hidden = (keys[:, pick] + spike[: dim // 2]).repeat_interleave(2, 1) * sign
    _set(new.k_proj, _interleaved(keys, hidden))
    offset = _offset(keys, mean, turned, generator)
    bias = _interleaved(torch.zeros(len(keys), dim, 1), offset[..., None])
    new.k_proj.bias.copy_(bias.flatten())
    _set(new.v_proj, _interleaved(values + spike, values - spike))
    output = old.o_proj.weight.float()
    new.o_proj.weight.copy_(output.repeat_interleave(2, 1) / 2)
    new.o_proj.bias.zero_()


def _interleaved(
    even: Float[Tensor, "heads dim n"], odd: Float[Tensor, "heads dim n"]
) -> Float[Tensor, "heads twice n"]:
    """Old channels at even places, which keep their RoPE frequencies there, new ones between."""
    return torch.stack((even, odd), dim=2).flatten(1, 2)


def _set(projection: nn.Linear, weight: Float[Tensor, "heads dim hidden"]) -> None:
    projection.weight.copy_(weight.flatten(0, 1))
    projection.bias.zero_()


def _detectors(
    model: PreTrainedModel, ids: Int[Tensor, " tokens"], massive_tokens: Sequence[int]
) -> list[Float[Tensor, " hidden"]]:
    """For every layer a direction along which only the massive tokens reach 1, by regression."""
    wanted = torch.isin(ids, torch.tensor(massive_tokens)).float()
    if not wanted.any():
        raise SixfoldError(f"the text holds none of the massive tokens {list(massive_tokens)}")
    inputs: list[Tensor] = []
    hooks = [
        layer.self_attn.k_proj.register_forward_pre_hook(
            lambda _, args: inputs.append(args[0][0].float())
        )
        for layer in model.model.layers
    ]
    try:
        model(input_ids=ids[None], use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return [_regression(x, wanted) for x in inputs]


def _regression(x: Float[Tensor, "tokens hidden"], y: Float[Tensor, " tokens"]) -> Tensor:
    ridge = 1e-3 * len(x) * torch.eye(x.shape[1])
    found: Tensor = torch.linalg.solve(x.mT @ x + ridge, x.mT @ y)
    # Shrinkage aside, those wanted are to reach 1.
    found /= (x @ found)[y > 0].mean()
    return found
