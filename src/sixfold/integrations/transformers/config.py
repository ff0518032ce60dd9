"""What a model's config says about the keys and values it caches."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from sixfold.cache import CachePolicy, LayerShape
from sixfold.errors import UnsupportedModelError
from sixfold.integrations.transformers.source import untouched_layers

COMPRESSED_TYPES = (
    *("full_attention", "sliding_attention", "chunked_attention"),
    *("hybrid", "hybrid_sliding", "indexed_attention"),
)
_NO_DECODER = (
    "is not a decoder: it reads all tokens at once, and no cache of it grows that could be "
    "compressed. Expected a model that generates text, such as Llama or Qwen; a BERT that was "
    "trained as a decoder has is_decoder=True in its config."
)
# Models whose recurrent layers keep their states in their modules, where no cache sees them.
STATES_IN_MODULES = ("recurrent_gemma",)
# Keys and values of something else than the text, which do not grow with it.
CROSS_ATTENTION = "cross_attention"


def decoder_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the text decoder.

    Raises:
        UnsupportedModelError: Not a config, or the model has an encoder, whose cross-attention
            cache is not a decoder's.
    """
    if not isinstance(config, PreTrainedConfig):
        raise UnsupportedModelError(
            f"expected a transformers config, got {type(config).__name__}: pass model.config."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(config).__name__} describes an encoder-decoder model; only decoder-only models "
            "have the growing key-value cache that Sixfold compresses."
        )
    text = config.get_text_config(decoder=True)
    # Models that fill in masked words; some of them can be made decoders by this field.
    if text.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        if not getattr(text, "is_decoder", False):
            raise UnsupportedModelError(f"{type(text).__name__} {_NO_DECODER}")
    return text


def check_decoder(model: PreTrainedModel) -> None:
    """Refuse a model none of whose attention is causal and which cannot generate.

    Raises:
        UnsupportedModelError: It is an encoder: it reads all tokens at once and caches none.
    """
    causal = {getattr(module, "is_causal", None) for module in model.modules()}
    if not model.can_generate() and False in causal and True not in causal:
        raise UnsupportedModelError(f"{type(model).__name__} {_NO_DECODER}")


def config_value(config: PreTrainedConfig, name: str) -> Any:
    """A field of a decoder's config, None without it; where layers differ, a list of theirs."""
    values = [getattr(layer, name, None) for layer in config.per_layer_config]
    return values[0] if all(value == values[0] for value in values) else values


def layer_types(config: PreTrainedConfig) -> tuple[list[str], list[dict[str, Any]]]:
    """Type of every layer and the arguments of its cache layer, as transformers derives them.

    Layers that attend to an image, which transformers gives no type of their own, are
    `CROSS_ATTENTION`.

    Raises:
        UnsupportedModelError: The config cannot be read, or no layer caches keys and values.
    """
    text = decoder_config(config)
    try:
        types, kwargs = get_layer_types_and_kwargs(text)
    except (AttributeError, TypeError, KeyError) as error:
        raise UnsupportedModelError(
            f"cannot read layer types from {type(text).__name__}: {error}. Expected a decoder "
            "config with num_hidden_layers and, if layers differ, layer_types."
        ) from error
    # A model that was cut to its first layers still has a type for each of those it had.
    types = types[: len(kwargs)]
    latents = [x for x in text.per_layer_config if getattr(x, "kv_lora_rank", None)]
    if any(getattr(layer, "qk_rope_head_dim", None) == 0 for layer in latents):
        raise UnsupportedModelError(
            f"{type(text).__name__} caches latents without rotary keys beside them "
            "(qk_rope_head_dim is 0): the second of the pair that a cache holds is empty, which "
            "Sixfold cannot compress yet. Use transformers' DynamicCache."
        )
    cross = set(getattr(text, "cross_attention_layers", None) or ())
    types = [CROSS_ATTENTION if index in cross else kind for index, kind in enumerate(types)]
    if not any(kind in COMPRESSED_TYPES for kind in types):
        raise UnsupportedModelError(
            f"{type(text).__name__} has no attention layer that Sixfold can compress: its layers "
            f"are {sorted(set(types))}, expected some of {list(COMPRESSED_TYPES)}."
        )
    if not any(map(_heads, text.per_layer_config)):
        raise UnsupportedModelError(
            f"{type(text).__name__} has no attention heads, so there are no keys and values to "
            "compress: use the model without a TurboQuantCache."
        )
    return types, kwargs


def fusable_layers(model: PreTrainedModel, count: int) -> set[int]:
    """Layers of a cache of `count` whose attention can run on codes.

    The others (Falcon attends by itself, DeepSeek expands cached latents, later layers of Gemma 3n
    read the keys of earlier ones) need dequantized tensors.
    """
    decoder = model.get_decoder()
    # Which goes by names: ModernBERT calls the layer after its last one `decoder`.
    decoder = decoder if isinstance(decoder, PreTrainedModel) else model
    # The flag `_supports_attention_backend` is unset on hybrids that do (Qwen3-Next).
    if not decoder._can_set_attn_implementation():
        return set()
    return untouched_layers(decoder, count)


def layer_shapes(
    config: PreTrainedConfig, policies: Sequence[CachePolicy | None]
) -> list[LayerShape]:
    """Shapes of the attention layers of a model that has never been loaded.

    Args:
        config: The model's config.
        policies: One a layer, as `layer_policies` makes them; None leaves a layer uncompressed.

    Returns:
        One shape for every layer that caches keys and values.
    """
    types, kwargs = layer_types(config)
    # Old versions of transformers leave out layers at the end that read the keys of others.
    configs = list(decoder_config(config).per_layer_config)[: len(types)]
    shapes = []
    for kind, options, layer, policy in zip(types, kwargs, configs, policies, strict=True):
        if kind not in COMPRESSED_TYPES:
            continue
        heads, key_dim, value_dim = _dims(layer)
        window = options.get("sliding_window")
        shapes.append(LayerShape(heads, key_dim, value_dim, window, policy))
    return shapes


def uncompressed_shapes(config: PreTrainedConfig) -> list[LayerShape]:
    """The shapes of a model whose cache is not compressed."""
    return layer_shapes(config, [None] * len(layer_types(config)[0]))


def coded_dims(config: PreTrainedConfig) -> set[tuple[int, int]]:
    """Key and value dimension of every layer that caches any."""
    return {(shape.key_dim, shape.value_dim) for shape in uncompressed_shapes(config)}


def _dims(config: PreTrainedConfig) -> tuple[int, int, int]:
    """KV heads, key dimension and value dimension of one layer."""
    if getattr(config, "kv_lora_rank", None) is not None:
        return 1, config.kv_lora_rank, config.qk_rope_head_dim
    heads = _heads(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return _kv_heads(config, heads), head_dim, getattr(config, "v_head_dim", None) or head_dim


def _heads(config: PreTrainedConfig) -> int:
    """Query heads of one layer; 0 without any. An encoder in the same config has its own."""
    names = ("decoder_attention_heads", "num_decoder_attention_heads", "num_attention_heads")
    return next((n for name in names if (n := getattr(config, name, None))), 0)


def _kv_heads(config: PreTrainedConfig, heads: int) -> int:
    if getattr(config, "model_type", "") == "falcon":
        # The newer architecture repeats its key heads before it caches them.
        return 1 if config.multi_query and not config.new_decoder_architecture else heads
    if getattr(config, "multi_query", False):
        return 1
    return getattr(config, "num_key_value_heads", None) or heads
