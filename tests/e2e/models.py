"""Tiny random decoder models: one of every architecture whose attention differs."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from tools.tiny import fill

VOCAB = 97
# Shorter than the longest prompts of a batch, and room for two pages of codes and most of a third.
WINDOW = 184

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_NO_GROUPS = {"num_key_value_heads": None}  # older than grouped queries: no such field
# Choosing every expert keeps the logits a continuous function of the cache.
_ALL_EXPERTS = {"num_experts_per_tok": 2, "norm_topk_prob": True}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How to build a tiny model, and what its cache is expected to do.

    Attributes:
        name: Name of the model's class without `ForCausalLM` or `LMHeadModel`.
        options: Arguments of the config beside the common ones.
        compressed: Layers whose keys and values become codes.
        dequantized: Those of them that cannot be attended as codes.
        key_gain: Spread of the attention logits.
    """

    name: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    compressed: tuple[int, ...] = (0, 1)
    dequantized: tuple[int, ...] = ()
    key_gain: float = 1.5


_SLIDING_FULL = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}

ARCHITECTURES = {
    "llama-20": Architecture("Llama", {"head_dim": 20}),
    "llama-64": Architecture("Llama", {"head_dim": 64}),
    "llama-80": Architecture("Llama", {"head_dim": 80}),
    "llama-96": Architecture("Llama", {"head_dim": 96}),
    "llama-128": Architecture("Llama", {"head_dim": 128}),
    "mistral": Architecture("Mistral", {"sliding_window": WINDOW, "head_dim": 32}),
    "qwen2": Architecture("Qwen2"),
    "qwen3": Architecture("Qwen3", {"head_dim": 32}),
    "gemma2": Architecture(
        "Gemma2",
        {
            **_SLIDING_FULL,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma3": Architecture(
        "Gemma3",
        {
            **_SLIDING_FULL,
            "head_dim": 256,
            "num_key_value_heads": 1,
            "query_pre_attn_scalar": 64,
        },
    ),
    # The last two layers attend to keys and values of the two before.
    "gemma4": Architecture(
        "Gemma4",
        {
            "sliding_window": WINDOW,
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "num_kv_shared_layers": 2,
            "head_dim": 32,
            "global_head_dim": 64,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB,
        },
        compressed=(0, 1, 2, 3),
        dequantized=(2, 3),
        key_gain=0.4,  # its logits are not divided by √head_dim
    ),
    "phi3": Architecture("Phi3"),
    "gpt2": Architecture("GPT2", {**_NO_GROUPS, "n_positions": 512}),
    "gpt-neox": Architecture("GPTNeoX", _NO_GROUPS),
    "opt": Architecture("OPT", {**_NO_GROUPS, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    # Falcon attends in its own code and never asks the attention interface.
    "falcon-multi-query": Architecture(
        "Falcon", {"multi_query": True, "alibi": False}, dequantized=(0, 1)
    ),
    "falcon-grouped": Architecture(
        "Falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
        dequantized=(0, 1),
    ),
    "falcon-alibi": Architecture(
        "Falcon", {"multi_query": False, "alibi": True}, dequantized=(0, 1)
    ),
    "olmo2": Architecture("Olmo2"),
    "cohere2": Architecture("Cohere2", {**_SLIDING_FULL, "head_dim": 32}),
    "gpt-oss": Architecture(
        "GptOss", {**_SLIDING_FULL, "head_dim": 32, "num_local_experts": 2, **_ALL_EXPERTS}
    ),
    # Multi-head latent attention expands what it caches before it attends.
    "deepseek-v3": Architecture(
        "DeepseekV3",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 32,
            "kv_lora_rank": 64,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
            "n_routed_experts": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            **_ALL_EXPERTS,
        },
        dequantized=(0, 1),
    ),
    # Keys longer than values, sinks, and twice the KV heads in sliding layers.
    "mimo-v2": Architecture(
        "MiMoV2Flash",
        {
            **_SLIDING_FULL,
            "head_dim": 48,
            "v_head_dim": 32,
            "n_routed_experts": 2,
            "moe_intermediate_size": 32,
            **_ALL_EXPERTS,
        },
    ),
    "smollm3": Architecture("SmolLM3", {"no_rope_layers": [1, 0]}),
    "starcoder2": Architecture("Starcoder2", {"sliding_window": None}),
    "qwen3-next": Architecture(
        "Qwen3Next",
        {
            "layer_types": ["linear_attention", "full_attention"],
            "head_dim": 32,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "num_experts": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            **_ALL_EXPERTS,
        },
        compressed=(1,),
    ),
    "lfm2": Architecture(
        "Lfm2",
        {
            "num_hidden_layers": 3,
            "layer_types": ["conv", "full_attention", "full_attention"],
            "block_auto_adjust_ff_dim": False,
        },
        compressed=(1, 2),
    ),
}


def tiny_model(name: str, attention: str = "eager") -> PreTrainedModel:
    """The model called `name`: one a session, shared by all tests, set to `attention`."""
    # A test may be the first of its process.
    model = _built(name)
    if model.config._attn_implementation != attention:
        model.set_attn_implementation(attention)
    return model


def fresh_model(name: str, **options: Any) -> PreTrainedModel:
    """A model of its own, for a test that changes it, with some config options replaced."""
    architecture = ARCHITECTURES[name]
    cls = _class(architecture.name)
    defaults = {**_COMMON, "attn_implementation": "eager"}
    arguments = {**defaults, **architecture.options, **options}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cls(cls.config_class(**arguments)).eval()
        for path, parameter in model.named_parameters():
            fill(path, parameter.data, architecture.key_gain)
    return model.requires_grad_(False)


@functools.cache
def _built(name: str) -> PreTrainedModel:
    return fresh_model(name)


def _class(name: str) -> Any:
    found = getattr(transformers, f"{name}ForCausalLM", None)
    return found or getattr(transformers, f"{name}LMHeadModel")
