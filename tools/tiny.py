"""Tiny random models of any architecture of transformers, made from its config class alone."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

VOCAB = 97
HIDDEN = 64
LAYERS = 4
# Shorter than the prompts of a sweep, longer than a page of codes.
WINDOW = 120

# By the names that configs use; a config takes those that it has and that are not None.
SIZES: dict[str, Any] = {
    **{"vocab_size": VOCAB, "vocab_size_per_layer_input": VOCAB, "pad_token_id": 0},
    **{"bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 512, "n_positions": 512},
    **{"hidden_size": HIDDEN, "intermediate_size": 96, "moe_intermediate_size": 32},
    **{"shared_expert_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32},
    **{"ffn_dim": 96, "word_embed_proj_dim": HIDDEN, "embedding_size": HIDDEN, "d_ff": 96},
    **{
        "decoder_ffn_dim": 96,
        "encoder_ffn_dim": 96,
        "decoder_layers": LAYERS,
        "encoder_layers": LAYERS,
    },
    **{"decoder_attention_heads": 4, "encoder_attention_heads": 4, "n_inner": 96},
    **{"num_attention_heads": 4, "head_dim": 16, "global_head_dim": 16, "v_head_dim": 16},
    **{"q_lora_rank": 32, "kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16},
    **{"o_lora_rank": 32, "o_groups": 2, "rotary_dim": 8, "attention_head_size": 16},
    **{"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0, "sliding_window": WINDOW},
    **{"attention_chunk_size": WINDOW, "index_topk": 512, "index_n_heads": 2},
    **{"index_head_dim": 32, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    # All experts are chosen: the logits stay a continuous function of the cache.
    **{"num_experts": 2, "num_local_experts": 2, "n_routed_experts": 2, "moe_num_experts": 2},
    **{"num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2, "top_k_experts": 2},
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16},
    **{"linear_value_head_dim": 16, "mamba_d_state": 16, "mamba_n_heads": 4, "mamba_d_head": 32},
    **{"mamba_d_ssm": 128, "mamba_n_groups": 1, "mamba_chunk_size": 16, "mamba_headdim": 64},
    **{"mamba_num_heads": 4, "mamba_head_dim": 32, "n_mamba_heads": 2, "mamba_ngroups": 1},
    **{"ssm_state_size": 16, "n_groups": 1, "chunk_size": 16, "lru_width": HIDDEN},
    **{"image_size": 28, "patch_size": 14, "num_channels": 3, "depth": 1, "embed_dim": HIDDEN},
    **{"num_heads": 4, "out_hidden_size": HIDDEN, "mm_tokens_per_image": 4},
}
# What single classes need beside.
OTHERS: dict[str, dict[str, Any]] = {
    "ChameleonConfig": {"vocabulary_map": {"<image>": 4}},
    "DeepseekV2Config": {"num_experts_per_tok": 2},
    "Dots1Config": {"n_routed_experts": 2},
    "Ernie4_5_VLMoeTextConfig": {"moe_intermediate_size": [32, 32]},
    "BambaConfig": {"attn_layer_indices": [1, 3]},
    "ZayaConfig": {
        "sliding_window": WINDOW,
        "num_experts_per_tok": 1,
        "layer_types": ["hybrid", "hybrid_sliding"] * 2,
    },
}
# Without a layer's kind among them: whatever pattern a model has, these hold all of it.
FALLBACK_LAYERS = (LAYERS, 6, 8)


def tiny_arguments(cls: type[PreTrainedConfig]) -> Iterator[dict[str, Any]]:
    """Arguments of config class `cls` to try one set after the other, the smallest first."""
    default = cls()
    kept = kept_layers(default)
    for layers in (kept, *(list(range(count)) for count in FALLBACK_LAYERS)):
        for real_heads in (False, True):
            for cut_lists in (True, False):
                yield _sizes(default, Shrink(layers, real_heads, cut_lists))


@dataclasses.dataclass(frozen=True)
class Shrink:
    """How a model is made small.

    Attributes:
        layers: Which of its layers are kept.
        real_heads: Keep the dimension of a head, which rotary embeddings may depend on.
        cut_lists: Keep only these layers' entries of lists that have one a layer.
    """

    layers: list[int]
    real_heads: bool
    cut_lists: bool


def kept_layers(config: PreTrainedConfig) -> list[int]:
    """Layers of a large model that a small one keeps: every kind, and at least `LAYERS`."""
    text = config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or []
    first = {kind: index for index, kind in reversed(list(enumerate(kinds)))}
    last = {kind: index for index, kind in enumerate(kinds)}
    kept = sorted({*first.values(), *last.values()})
    total = getattr(text, "num_hidden_layers", LAYERS)
    spare = [index for index in range(total) if index not in kept]
    return sorted(kept + spare[: max(LAYERS - len(kept), 0)])


def _sizes(config: PreTrainedConfig, shrink: Shrink) -> dict[str, Any]:
    """Arguments that make `config` small."""
    total = _read(config, "num_hidden_layers")
    wanted = dict(SIZES)
    heads, groups = (_read(config, f"num_{x}_heads") for x in ("attention", "key_value"))
    wanted["num_key_value_heads"] = 4 if groups == heads else 2
    if isinstance(total, int):
        wanted["num_hidden_layers"] = len(shrink.layers)
    if shrink.real_heads and isinstance(heads, int):
        head_dim = _read(config, "head_dim") or _read(config, "hidden_size") // heads
        wanted |= {"head_dim": head_dim, "hidden_size": 4 * head_dim}
    alias = config.attribute_map
    sizes = {alias.get(name, name): x for name, x in wanted.items() if _read(config, name)}
    if shrink.cut_lists:
        for name, value in vars(config).items():
            if isinstance(value, list) and len(value) == total:
                sizes[name] = [value[index] for index in shrink.layers if index < total]
    for name in config.sub_configs:
        part = _read(config, name)
        if isinstance(part, PreTrainedConfig):
            sizes[name] = {"model_type": part.model_type, **_sizes(part, shrink)}
    return sizes | OTHERS.get(type(config).__name__, {})


def _read(config: PreTrainedConfig, name: str) -> Any:
    """A field's value; None for what is computed from others, or is no field at all."""
    if isinstance(getattr(type(config), name, None), property):
        return None
    try:
        return getattr(config, name, None)
    except Exception:  # layers differ, so that there is no value for all
        return vars(config).get(name)


_QUERY_KEY = re.compile(r"\b(q|k|qkv|q_b|query_key_value|c_attn|q_norm|k_norm)(_proj)?\.\w+$")


def fill(path: str, parameter: Tensor, key_gain: float) -> None:
    """Make every part of a model matter: large weights, biases and norms away from identity.

    Args:
        path: The parameter's name in the model.
        parameter: Changed in place.
        key_gain: Spread of the attention logits.
    """
    gain = key_gain if _QUERY_KEY.search(path) else 1.0
    if path.endswith("sinks"):
        parameter.normal_(7, 1)  # as much of the softmax as the largest tokens take
    elif parameter.dim() > 1:
        parameter.normal_(0, gain * HIDDEN**-0.5)
    else:
        parameter.add_(torch.randn_like(parameter), alpha=0.2).mul_(gain)
