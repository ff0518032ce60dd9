"""Saving a transformers cache, and loading it for the model that filled it."""

import json
import math
import os
import warnings
from collections.abc import Sequence
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from sixfold.cache.policy import CachePolicy
from sixfold.cache.state import layer_state, restore_layer
from sixfold.cache.validate import check_finite
from sixfold.errors import FormatError
from sixfold.integrations.transformers.checks import expected_layers
from sixfold.integrations.transformers.combined import held_beside
from sixfold.integrations.transformers.config import config_value, decoder_config, layer_types
from sixfold.integrations.transformers.layer import TurboQuantLayer
from sixfold.integrations.transformers.layers import CrossAttentionLayer
from sixfold.integrations.transformers.model_layers import model_layers
from sixfold.integrations.transformers.weights import check_weights, weights_digest
from sixfold.io import DTYPE_NAMES, open_container, write_container

KIND = "transformers-cache"


def save_cache(
    cache_layers: Sequence[Any],
    config: PreTrainedConfig,
    model: PreTrainedModel | None,
    path: str | os.PathLike[str],
    prompt: nn.Module | None = None,
) -> None:
    """Write everything `cache_layers` hold; see `TurboQuantCache.save`."""
    layers: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for index, layer in enumerate(cache_layers):
        description, held = _describe(layer)
        layers.append(description)
        tensors |= {f"layers.{index}.{name}": tensor for name, tensor in held.items()}
    try:
        # What is written can be read: better an error now, while the cache is at hand.
        expected_layers(layers, list(map(_policy, layers)), model_layers(config, model))
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"this cache does not fit its model and is not saved: {error}."
        ) from error
    digest = None if model is None else weights_digest(model, prompt)
    if model is not None and digest is None:
        warnings.warn(
            "some weights of the model are on the meta device and cannot be read: whoever loads "
            f"{path} will not be told if other weights read it.",
            stacklevel=4,
        )
    description = {
        "model": model_description(config),
        "dtype": None if model is None else str(model.dtype),
        "weights": digest,
        "layers": layers,
    }
    write_container(path, KIND, description, tensors)


def load_layers(
    path: str | os.PathLike[str],
    model: PreTrainedModel,
    check: bool,
    prompt: nn.Module | None = None,
) -> tuple[list[CachePolicy | None], list[dict[str, Any]], dict[str, Tensor]]:
    """Check a file against `model`, then read it: policies, layer descriptions and tensors."""
    with open_container(path, KIND) as container:
        description = container.description
        _check_model(path, description, model, check)
        if check:
            check_weights(path, description.get("weights"), model, prompt)
        try:
            layers = description["layers"]
            if len(layers) != len(description["model"]["layers"]):
                raise ValueError(f"it describes {len(layers)} layers")
            policies = [_policy(layer) for layer in layers]
            expected = expected_layers(layers, policies, model_layers(model.config, model))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise FormatError(f"{path} is damaged: its description is wrong ({error}).") from error
        container.expect(expected)
        return policies, layers, container.read()


def fill(layer: Any, description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Put what was stored of one layer into an empty cache layer.

    Raises:
        FormatError: The tensors hold numbers that no layer holds.
    """
    if isinstance(layer, TurboQuantLayer):
        if "batch" in description:
            spec = layer.policy, layer.sliding_window, layer.key_map
            layer.adopt(restore_layer(description, tensors, *spec))
        others = {name: tensors[name] for name in description.get("tensors", {})}
        for name, tensor in others.items():
            check_finite(name, tensor)
        layer.adopt_extra(others)
        return
    for name, tensor in tensors.items():
        check_finite(name, tensor)
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        _fill_states(layer, tensors)
    elif tensors:
        layer.lazy_initialization(tensors["keys"], tensors["values"])
        layer.keys, layer.values = tensors["keys"], tensors["values"]
        if isinstance(layer, CrossAttentionLayer):
            layer.parts = tuple((after, keys) for after, keys in description.get("parts", []))
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = description["length"]


# What two models must share for one to read the other's cache, whether a file says it or not.
_ALIKE = (
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "kv_lora_rank",
    "vocab_size",
    # Not weights, but keys are rotated by them.
    "rope_parameters",
    *("type", "layers", "sliding_windows"),
)
# What of a config changes no key and no value of a cache: of files that say more of theirs, all
# other fields that both have are compared (a scale or an activation is no weight either).
_NO_MATTER = frozenset(
    (
        *("architectures", "transformers_version", "dtype", "torch_dtype", "quantization_config"),
        *("use_cache", "return_dict", "return_legacy_cache", "cache_implementation"),
        *("tie_word_embeddings", "chunk_size_feed_forward", "pretraining_tp", "torchscript"),
        *("id2label", "label2id", "num_labels", "problem_type", "auto_map", "tokenizer_class"),
        # Not what else begins so: a multiplier of MuseSpark's does.
        *("output_attentions", "output_hidden_states", "output_router_logits"),
        *("is_decoder", "is_encoder_decoder", "final_logit_softcapping", "use_mamba_kernels"),
    )
)
_NO_MATTER_IN = ("drop", "initializer", "_loss", "token_id", "summary_")
# Rotations that change with the longest text that a model is said to be for.
_ROPE_BY_LENGTH = ("dynamic", "longrope", "yarn")


def model_description(config: PreTrainedConfig) -> dict[str, Any]:
    """What two models must share for one to read the other's cache."""
    text = decoder_config(config)
    types, kwargs = layer_types(config)
    rope = str(config_value(text, "rope_parameters"))
    by_length = any(kind in rope for kind in _ROPE_BY_LENGTH)
    windows = [options.get("sliding_window") for options in kwargs]
    described = {
        **_what_matters(text.to_dict(), by_length),
        **{name: config_value(text, name) for name in _ALIKE},
        **{"type": text.model_type, "layers": types, "sliding_windows": windows},
        "transformers": transformers.__version__,
    }
    # As it comes back from a file: lists for tuples, strings for anything exotic.
    as_json: dict[str, Any] = json.loads(json.dumps(described, default=_as_text))
    return as_json


def _what_matters(fields: dict[str, Any], by_length: bool) -> dict[str, Any]:
    kept = {}
    for name, value in fields.items():
        known = str(name)
        if known.startswith("_") or known in _NO_MATTER:
            continue
        if any(part in known for part in _NO_MATTER_IN):
            continue
        if known == "max_position_embeddings" and not by_length:
            continue
        kept[known] = _what_matters(value, by_length) if isinstance(value, dict) else _finite(value)
    return kept


def _finite(value: Any) -> Any:
    """The same, as text where JSON has no number for it (a limit of Falcon-H1's is infinite)."""
    if isinstance(value, list | tuple):
        return [_finite(member) for member in value]
    if isinstance(value, dict):
        return {name: _finite(member) for name, member in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _as_text(value: Any) -> str:
    text = str(value)
    # Where something lies is nothing that two runs share.
    return type(value).__name__ if " at 0x" in text else text


def _check_model(
    path: Any, description: dict[str, Any], model: PreTrainedModel, check: bool
) -> None:
    stored, own = description.get("model"), model_description(model.config)
    stored = stored if isinstance(stored, dict) else {}
    # Files of earlier versions say less, and libraries add fields.
    compared = own.keys() & (stored.keys() | set(_ALIKE)) - {"transformers"}
    strict = stored.get("transformers") == own["transformers"]
    differ = {
        name: (stored.get(name), own[name])
        for name in sorted(compared)
        if _differ(stored.get(name), own[name], strict)
    }
    if differ:
        raise FormatError(f"{path} was saved for another model: (file, this model) = {differ}.")
    dtype = description.get("dtype")
    if check and dtype is not None and dtype != str(model.dtype):
        raise FormatError(
            f"{path} was saved for the model in {dtype}, this one is in {model.dtype}: load the "
            "model in that dtype, or pass check_weights=False to convert the cache."
        )


def _differ(stored: Any, own: Any, strict: bool) -> bool:
    """Whether two values differ; of objects, in a field that both have, unless `strict`.

    Another version of the library may add fields; the same one leaves out what has no value.
    """
    if isinstance(stored, dict) and isinstance(own, dict):
        names = stored.keys() | own.keys() if strict else stored.keys() & own.keys()
        return any(_differ(stored.get(name), own.get(name), strict) for name in names)
    return bool(stored != own)


def _describe(layer: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if isinstance(layer, TurboQuantLayer):
        state = ({}, {}) if layer.store is None else layer_state(layer.store)
        extra = {name: _state(layer, name, x) for name, x in layer.extra_tensors().items()}
        described = {"policy": layer.policy.to_dict(), **state[0]}
        if extra:
            described["tensors"] = _specs(extra)
        return described, state[1] | extra
    tensors = _dense_tensors(layer)
    for name, tensor in tensors.items():
        check_finite(name, tensor)
    length = layer.get_seq_length() if isinstance(layer, DynamicLayer) else 0
    described = {"policy": None, "tensors": _specs(tensors), "length": length}
    if isinstance(layer, CrossAttentionLayer):
        described["parts"] = [list(part) for part in layer.parts]
    return described, tensors


def _specs(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {
        name: [list(x.shape), DTYPE_NAMES.get(x.dtype, str(x.dtype))] for name, x in tensors.items()
    }


def _dense_tensors(layer: Any) -> dict[str, Tensor]:
    if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer, CrossAttentionLayer):
        held = layer.is_initialized and layer.keys.numel()
        return {"keys": layer.keys, "values": layer.values} if held else {}
    if type(layer) is LinearAttentionLayer:
        return {name: _state(layer, name, x) for name, x in held_beside(layer).items()}
    if hasattr(layer, "update_conv_state") or (layer.is_initialized and layer.keys is not None):
        raise FormatError(f"layers of type {type(layer).__name__} cannot be saved yet.")
    return {}


def _state(layer: Any, name: str, state: Tensor) -> Tensor:
    """A state without the past that is recorded for `crop`: a loaded one has no such past."""
    kind, _, index = name.partition(".")
    size = layer.conv_kernel_size[int(index)] if kind == "conv_states" else None
    return state if size is None else state[..., -size:]


def _policy(description: dict[str, Any]) -> CachePolicy | None:
    fields = description["policy"]
    # Files of version 1 know no other code.
    return None if fields is None else CachePolicy(**{"code": "codebook", **fields})


def _fill_states(layer: Any, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        kind, index = name.split(".")
        layer.lazy_initialization(**{kind: tensor}, state_idx=int(index))
        getattr(layer, kind)[int(index)].copy_(tensor)
        layer.has_previous_state[int(index)] = True
