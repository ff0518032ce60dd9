"""What a model has at each of its layers, so far as its config and its modules tell."""

import dataclasses
from collections import defaultdict
from functools import cache
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, LinearAttentionCacheLayerMixin

from sixfold.integrations.transformers.config import (
    COMPRESSED_TYPES,
    CROSS_ATTENTION,
    layer_types,
    uncompressed_shapes,
)
from sixfold.integrations.transformers.source import methods

# How a module hands on what it keeps beside keys and values, and what that is.
_UPDATES = {
    "update_conv_state": "conv_states",
    "update_recurrent_state": "recurrent_states",
    "update_indexer": "indexer_keys",
}


@dataclasses.dataclass(frozen=True)
class ModelLayer:
    """What a model has at one layer.

    Attributes:
        kind: Its type, as transformers names it.
        attends: Whether it caches keys and values of the text.
        cross: Whether it caches keys and values of something else, such as an image.
        sliding_window: Tokens a query sees, itself included; None for all.
        shape: KV heads, key and value dim; None where only the model could say.
        states: Convolution or recurrent states that it caches otherwise.
        keeps: What it is known to keep beside keys and values, as `held_beside` names it.
        convolutions: Channels and kernel size of each of its convolutions; none if not known.
    """

    kind: str
    attends: bool
    cross: bool
    sliding_window: int | None
    shape: tuple[int, int, int] | None
    states: int
    keeps: frozenset[str] = frozenset()
    convolutions: frozenset[tuple[int, int]] = frozenset()


def model_layers(config: PreTrainedConfig, model: PreTrainedModel | None) -> list[ModelLayer]:
    """Every layer of a model; its shape from its projections where it has any, else its config."""
    types, options = layer_types(config)
    attends = [kind in COMPRESSED_TYPES for kind in types]
    shapes: dict[int, tuple[int, int, int]] = {}
    keeps: dict[int, set[str]] = {}
    convolutions: dict[int, set[tuple[int, int]]] = {}
    if model is not None:
        numbers = (index for index, own in enumerate(attends) if own)
        if not _tensor_parallel(model):
            for index, x in zip(numbers, uncompressed_shapes(config), strict=True):
                shapes[index] = x.kv_heads, x.key_dim, x.value_dim
            keeps, convolutions = _kept_beside(model)
        shapes |= _projected(model)
    return [
        ModelLayer(
            kind,
            own,
            kind == CROSS_ATTENTION,
            kwargs.get("sliding_window"),
            shapes.get(index) if own or kind == CROSS_ATTENTION else None,
            kwargs.get("number_of_states", 1) if _has_states(kind) else 0,
            frozenset(keeps.get(index, ())),
            frozenset(convolutions.get(index, ())),
        )
        for index, (kind, own, kwargs) in enumerate(zip(types, attends, options, strict=True))
    ]


def _has_states(kind: str) -> bool:
    return issubclass(DYNAMIC_LAYER_TYPE_MAPPING.get(kind, object), LinearAttentionCacheLayerMixin)


def _kept_beside(
    model: PreTrainedModel,
) -> tuple[dict[int, set[str]], dict[int, set[tuple[int, int]]]]:
    """What the modules of each layer keep beside keys and values, and, if all known, their
    convolutions.
    """
    keeps: dict[int, set[str]] = defaultdict(set)
    convolutions: dict[int, set[tuple[int, int]]] = defaultdict(set)
    unknown: set[int] = set()
    for module in model.get_decoder().modules():
        index: Any = getattr(module, "layer_idx", None)
        if not isinstance(index, int):
            continue
        for part in module.modules():
            cls: Any = type(part)  # hashable, which a module's own type hints hide
            keeps[index] |= (kept := _kept_by(cls))
            if "conv_states" in kept:
                convolutions[index] |= (found := _convolutions(part))
                if not found:  # it convolves in its own way (Inkling 2)
                    unknown.add(index)
    return keeps, {i: found for i, found in convolutions.items() if i not in unknown}


@cache
def _kept_by(cls: Any) -> frozenset[str]:
    called = {name for _, names in methods(cls) for name in names}
    return frozenset(kind for name, kind in _UPDATES.items() if name in called)


def _convolutions(module: nn.Module) -> set[tuple[int, int]]:
    found = (part for part in module.modules() if isinstance(part, nn.Conv1d))
    return {(part.in_channels, part.kernel_size[0]) for part in found}


def _projected(model: PreTrainedModel) -> dict[int, tuple[int, int, int]]:
    """KV heads, key and value dim of the layers with separate projections, by their number.

    Configs name these in many ways; what a projection gives is what is cached.
    """
    found: dict[int, tuple[int, int, int]] = {}
    shared = _tensor_parallel(model)
    for module in model.get_decoder().modules():
        index: Any = getattr(module, "layer_idx", None)
        dim: Any = getattr(module, "head_dim", None)
        keys = _outputs(getattr(module, "k_proj", None), shared)
        values = _outputs(getattr(module, "v_proj", None), shared) or keys
        if not all(isinstance(n, int) for n in (index, dim, keys, values)):
            continue
        if dim > 0 and keys > 0 and keys % dim == 0:
            found.setdefault(index, (keys // dim, dim, values // (keys // dim)))
    return found


def _tensor_parallel(model: PreTrainedModel) -> bool:
    """Whether each process has some heads of every layer: a config has them all."""
    return (getattr(model, "_tp_size", None) or 1) > 1


def _outputs(projection: Any, shared: bool) -> Any:
    """Outputs of a projection, or this process's share of them; None where it has none."""
    outputs: Any = getattr(projection, "out_features", None)
    weight: Any = getattr(projection, "weight", None)
    own: Any = getattr(weight, "_local_tensor", None) if shared else None
    return outputs if own is None or outputs is None else outputs * len(own) // len(weight)
