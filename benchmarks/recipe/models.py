"""The models of the study, and changes of a model that leave what it computes as it was."""

import copy
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.evaluate import DETECTION_TOKENS
from benchmarks.hard import with_hidden_channels, with_outlier_channels
from sixfold.eval.embedded import haystack, load_embedded

CALIBRATION_TOKENS = 768


def plain() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The embedded model, in float32."""
    return load_embedded()


def hard(massive: float = 10.0) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Its hard variant; `massive` as in `benchmarks.hard`."""
    model, tokenizer = load_embedded()
    ids = torch.tensor(tokenizer(haystack(), verbose=False)["input_ids"])[:DETECTION_TOKENS]
    line_break = tokenizer("\n")["input_ids"][-1]
    outliers = with_outlier_channels(model)
    return with_hidden_channels(outliers, ids, [line_break], massive=massive), tokenizer


def harder() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The hard variant with massive tokens twice as large."""
    return hard(20.0)


MODELS: dict[str, Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]] = {
    "plain": plain,
    "hard": hard,
    "massive x2": harder,
}


@torch.no_grad()
def with_value_map(
    model: PreTrainedModel, ids: Int[Tensor, " tokens"], *, center: bool, weigh: bool
) -> PreTrainedModel:
    """A copy whose values are mapped by v' = (v - m)·b, and whose output projection undoes it.

    Attention is linear in values and its weights sum to one: W·Σp·v = (W/b)·Σp·v' + W·m, so a map
    of values needs no cache to know of it. m and σ_v are those of the values of `ids`.

    Args:
        model: A Llama.
        ids: Text to estimate from.
        center: Whether m is the mean value of every KV head, or zero.
        weigh: Whether b is (|w_j|/σ_v,j)^½, where w_j are the columns of W that read channel j: the
            diagonal minimiser of the expected error after W, as in docs/key_map.md. One otherwise.
    """
    mapped = copy.deepcopy(model)
    values = _values(model, ids)
    for layer, x in zip(mapped.model.layers, values, strict=True):
        attention = layer.self_attn
        heads, _, dim = x.shape
        groups = attention.o_proj.weight.unflatten(1, (heads, -1, dim))
        mean = x.mean(1) if center else torch.zeros(heads, dim)
        spread = (x - mean[:, None]).square().mean(1).sqrt()
        scale = (groups.square().sum((0, 2)).sqrt() / spread).sqrt() if weigh else mean * 0 + 1
        # A factor that all channels of a head share changes nothing.
        scale = scale / scale.log().mean(1, keepdim=True).exp()
        offset = torch.einsum("ohgd,hd->o", groups, mean)
        weight = attention.v_proj.weight.unflatten(0, (heads, dim)) * scale[..., None]
        old = attention.v_proj.bias
        bias = ((0 if old is None else old.unflatten(0, (heads, dim))) - mean) * scale
        attention.v_proj = _linear(weight.flatten(0, 1), bias.flatten())
        shift = offset if attention.o_proj.bias is None else attention.o_proj.bias + offset
        attention.o_proj = _linear((groups / scale[:, None]).flatten(1), shift)
    return mapped


def _values(
    model: PreTrainedModel, ids: Int[Tensor, " tokens"]
) -> list[Float[Tensor, "kv_heads tokens dim"]]:
    """The values of every layer."""
    found: list[Tensor] = []
    hooks = [
        layer.self_attn.v_proj.register_forward_hook(lambda _, __, out: found.append(out[0]))
        for layer in model.model.layers
    ]
    try:
        model(input_ids=ids[None], use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    heads = model.config.num_key_value_heads
    return [x.float().unflatten(1, (heads, -1)).transpose(0, 1) for x in found]


def _linear(weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"]) -> torch.nn.Linear:
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
    return layer
