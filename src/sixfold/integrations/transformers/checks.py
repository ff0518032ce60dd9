"""What a stored layer must share with the model's layer, and with the other layers."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from sixfold.cache import CachePolicy
from sixfold.cache.state import MOST, expected_tensors, tokens_seen, whole
from sixfold.integrations.transformers.combined import INDEXER, STATES
from sixfold.integrations.transformers.config import (
    COMPRESSED_TYPES,
    CROSS_ATTENTION,
    layer_types,
    uncompressed_shapes,
)
from sixfold.io import TensorSpec

FLOATS = ("F64", "F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True)
class ModelLayer:
    """What a model has at one layer.

    Attributes:
        attends: Whether it caches keys and values of the text.
        cross: Whether it caches keys and values of something else, such as an image.
        sliding_window: Tokens a query sees, itself included; None for all.
        shape: KV heads, key and value dim; None where only the model could say.
        states: Convolution or recurrent states that it caches otherwise.
    """

    attends: bool
    cross: bool
    sliding_window: int | None
    shape: tuple[int, int, int] | None
    states: int


def model_layers(config: PreTrainedConfig, model: PreTrainedModel | None) -> list[ModelLayer]:
    """Every layer of a model; its shape from its projections where it has any, else its config."""
    types, options = layer_types(config)
    attends = [kind in COMPRESSED_TYPES for kind in types]
    shapes: dict[int, tuple[int, int, int]] = {}
    if model is not None:
        numbers = (index for index, own in enumerate(attends) if own)
        if not _tensor_parallel(model):
            for index, x in zip(numbers, uncompressed_shapes(config), strict=True):
                shapes[index] = x.kv_heads, x.key_dim, x.value_dim
        shapes |= _projected(model)
    return [
        ModelLayer(
            own,
            kind == CROSS_ATTENTION,
            kwargs.get("sliding_window"),
            shapes.get(index) if own else None,
            kwargs.get("number_of_states", 1),
        )
        for index, (kind, own, kwargs) in enumerate(zip(types, attends, options, strict=True))
    ]


def expected_layers(
    layers: list[dict[str, Any]],
    policies: list[CachePolicy | None],
    model: list[ModelLayer],
) -> dict[str, TensorSpec]:
    """The tensors that these layers of a cache have.

    Raises:
        KeyError, TypeError, ValueError: A description contradicts itself, the model, or another.
    """
    expected: dict[str, TensorSpec] = {}
    sizes: dict[str, set[int]] = {"sequences": set(), "tokens": set()}
    arrivals: list[int] = []
    for index, (layer, policy, own) in enumerate(zip(layers, policies, model, strict=True)):
        try:
            specs, batch, tokens = _layer(layer, policy, own)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"layer {index}: {error}") from error
        if specs:
            sizes["sequences"].add(batch)
            sizes["tokens"] |= {tokens} if own.attends else set()
            arrivals += [after for after, _ in layer.get("parts", [])] if own.cross else []
        expected |= {f"layers.{index}.{name}": spec for name, spec in specs.items()}
    for name, found in sizes.items():
        if len(found) > 1:
            raise ValueError(f"its layers hold different numbers of {name}: {sorted(found)}")
    if arrivals and max(arrivals) >= max(sizes["tokens"], default=0):
        raise ValueError(f"something arrived after {max(arrivals)} tokens of fewer")
    return expected


def _layer(
    layer: Mapping[str, Any], policy: CachePolicy | None, own: ModelLayer
) -> tuple[dict[str, TensorSpec], int, int]:
    """Tensors of a layer, and how many sequences of how many tokens it has seen."""
    others = {name: _spec(name, *spec) for name, spec in layer.get("tensors", {}).items()}
    batch = {spec.shape[INDEXER.get(name, 0)] for name, spec in others.items()}
    if "batch" in layer:
        batch.add(whole(layer, "batch"))
    if len(batch) > 1:
        raise ValueError(f"tensors of different numbers of sequences: {sorted(batch)}")
    if policy is None:
        check = _check_dense if own.attends or own.cross else _check_states
        check(layer, others, own)
        return others, batch.pop() if batch else 0, whole(layer, "length")
    if not own.attends:
        raise ValueError("it is compressed, and the model's layer has no keys and values")
    _check_states(layer, {n: x for n, x in others.items() if n not in INDEXER}, own)
    if "batch" not in layer:
        return others, batch.pop() if batch else 0, 0
    specs = others | expected_tensors(layer, policy, own.sliding_window)
    found = layer["kv_heads"], layer["key_dim"], layer["value_dim"]
    _check_shape(found, own.shape)
    return specs, layer["batch"], tokens_seen(layer)


def _check_shape(found: tuple[int, int, int], expected: tuple[int, int, int] | None) -> None:
    if expected is not None and found != expected:
        raise ValueError(f"KV heads, key and value dim are {found}, the model's are {expected}")


def _check_dense(
    layer: Mapping[str, Any], specs: Mapping[str, TensorSpec], own: ModelLayer
) -> None:
    length = whole(layer, "length")
    if not specs:
        if length:
            raise ValueError(f"it has seen {length} tokens and holds none")
        return
    keys, values = specs["keys"], specs["values"]
    alike = keys.dtype == values.dtype and keys.shape[:3] == values.shape[:3]
    if len(specs) > 2 or not alike or len(keys.shape) != 4 or len(values.shape) != 4:
        raise ValueError(f"expected a value for every key, alike, got {dict(specs)}")
    _check_shape((keys.shape[1], keys.shape[3], values.shape[3]), own.shape)
    if own.cross:
        _check_parts(layer.get("parts", []), keys.shape[2])
        return
    window = length if own.sliding_window is None else min(length, own.sliding_window - 1)
    least = length if own.sliding_window is None else window
    if not least <= keys.shape[2] <= length:
        raise ValueError(f"it has seen {length} tokens and holds {keys.shape[2]}")


def _check_parts(parts: Any, held: int) -> None:
    """Refuse what is no list of [tokens of the text before, keys], in order, of `held` keys."""
    if type(parts) is not list or not all(type(x) is list and len(x) == 2 for x in parts):
        raise TypeError(f"expected pairs, got parts {parts!r}")
    numbers = [n for part in parts for n in part]
    after = numbers[::2]
    valid = all(type(n) is int and 0 <= n <= MOST for n in numbers) and after == sorted(after)
    if not valid or sum(numbers[1::2]) > held:
        raise ValueError(f"parts {parts} do not fit {held} keys")


def _check_states(
    layer: Mapping[str, Any], specs: Mapping[str, TensorSpec], own: ModelLayer
) -> None:
    names = {f"{kind}.{index}" for kind in STATES for index in range(own.states)}
    if not specs.keys() <= names:
        raise ValueError(f"expected some of {sorted(names)}, got {sorted(specs)}")


def _spec(name: str, shape: Any, dtype: Any) -> TensorSpec:
    dtypes = ("I64",) if name == "indexer_position_ids" else FLOATS
    if type(shape) is not list or len(shape) < 2 or dtype not in dtypes:
        raise TypeError(f"{name} has shape {shape!r} and dtype {dtype!r}")
    if not all(type(n) is int and 1 <= n <= MOST for n in shape):
        raise TypeError(f"{name} has shape {shape!r}")
    return TensorSpec(tuple(shape), dtype)


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
