"""The model that this process serves, as vLLM knows it once its layers are made."""

import weakref
from typing import Any

from vllm.config import get_current_vllm_config_or_none

from sixfold.integrations.vllm.alignment import LayerBlock
from sixfold.packing import PAGE_TOKENS

_config: weakref.ref[Any] | None = None


def remember() -> None:
    """Called while a layer is made: vLLM says only then which model it is for."""
    global _config
    config = get_current_vllm_config_or_none()
    _config = None if config is None else weakref.ref(config)


def served() -> Any | None:
    """vLLM's config; None before any layer is made, and once it is gone."""
    return None if _config is None else _config()


def layer_block(layer: Any, sliding: bool, vllm_config: Any) -> LayerBlock:
    """The blocks of a layer, or of a spec of vLLM's: of sliding layers the smallest there are."""
    tokens = PAGE_TOKENS if sliding else vllm_config.cache_config.block_size
    return LayerBlock(layer.num_kv_heads, layer.head_size, layer.head_size_v, tokens)


def layer_blocks(kind: type, vllm_config: Any) -> list[LayerBlock]:
    """Those of all layers whose attention is of this kind."""
    return [
        layer_block(layer, layer.sliding_window is not None, vllm_config)
        for layer in vllm_config.compilation_config.static_forward_context.values()
        if isinstance(getattr(layer, "impl", None), kind)
    ]
