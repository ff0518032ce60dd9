"""The embedded model's shape, and its forward pass as training wants it."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, GenerationConfig, LlamaConfig, LlamaForCausalLM

from training.induction import start_with_induction

MAX_LENGTH = 2048


def _causal_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: object, **options: object
) -> tuple[Tensor, None]:
    """Attend causally without a mask tensor, so that the flash kernel can run.

    Every training row is full, and transformers builds no mask for an attention it does not
    know.
    """
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("training_causal", _causal_attention)


def make_config(vocab_size: int) -> LlamaConfig:
    """Return a Llama of 3.4 million parameters."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=1,
    )


def make_model(config: LlamaConfig) -> LlamaForCausalLM:
    """Build a freshly initialised model that trains on full causal rows."""
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("training_causal")
    start_with_induction(model)
    return model


def weighted_loss(model: nn.Module, ids: Tensor, weights: Tensor) -> Tensor:
    """Return the mean next-token loss of ``[rows, length + 1]`` ids under their weights."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    losses = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    chosen = weights[:, 1:].flatten()
    return (losses * chosen).sum() / chosen.sum()


def export_model(model: LlamaForCausalLM, folder: Path, length: int) -> None:
    """Write config, bfloat16 weights and generation settings, for ``from_pretrained``."""
    copy = LlamaForCausalLM(LlamaConfig(**model.config.to_dict()))
    copy.load_state_dict(model.state_dict())
    copy.config.max_position_embeddings = length
    copy.generation_config = GenerationConfig(
        bos_token_id=0, eos_token_id=None, pad_token_id=1, do_sample=False
    )
    copy.bfloat16().save_pretrained(folder)
