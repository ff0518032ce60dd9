"""Tiny random models of other architectures, with the embedded model's tokenizer."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

COMMON = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 1,
}
GEMMA = {"query_pre_attn_scalar": 64, "sliding_window": 128}
# Window and full layers, soft-capped logits, biases, wide heads, one KV head; layers whose heads
# differ, of which vLLM makes blocks of one size.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {"num_hidden_layers": 4, **GEMMA}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {"num_hidden_layers": 6, **GEMMA}),
    "gemma4": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {
            "num_hidden_layers": 6,
            "sliding_window": 128,
            "global_head_dim": 128,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 1024,
            "layer_types": [*["sliding_attention"] * 5, "full_attention"],
        },
    ),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"num_hidden_layers": 4}),
    "mistral": (
        "MistralConfig",
        "MistralForCausalLM",
        {"num_hidden_layers": 4, "sliding_window": 100},
    ),
    "llama128": ("LlamaConfig", "LlamaForCausalLM", {"num_hidden_layers": 4, "head_dim": 128}),
    "llama256": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {"num_hidden_layers": 4, "head_dim": 256, "num_key_value_heads": 1},
    ),
}


def save(name: str, folder: Path, embedded: Path) -> Path:
    """Write a model that vLLM reads."""
    config, model, options = MODELS[name]
    torch.manual_seed(0)
    make: Callable[..., Any] = getattr(transformers, model)
    # Smaller, and all logits are alike; larger, and rounding alone changes the answers.
    spread = {"initializer_range": 0.05}
    made = make(getattr(transformers, config)(**{**COMMON, **spread, **options}))
    path = folder / name
    made.to(torch.bfloat16).save_pretrained(path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded / file, path)
    return path
