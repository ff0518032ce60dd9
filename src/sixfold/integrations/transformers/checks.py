"""What a stored layer must share with the model's layer, and with the other layers."""

from collections.abc import Mapping, Sequence
from typing import Any

from sixfold.cache import CachePolicy
from sixfold.cache.state import MOST, expected_tensors, tokens_seen, whole
from sixfold.integrations.transformers.combined import INDEXER, STATES
from sixfold.integrations.transformers.model_layers import ModelLayer
from sixfold.io import TensorSpec

FLOATS = ("F64", "F32", "F16", "BF16")


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
    found: list[dict[str, TensorSpec]] = []
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
        found.append(specs)
    for name, numbers in sizes.items():
        if len(numbers) > 1:
            raise ValueError(f"its layers hold different numbers of {name}: {sorted(numbers)}")
    _check_beside(found, model)
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
    tokens = tokens_seen(layer) if "batch" in layer else 0
    for name in INDEXER.keys() & others.keys():
        shape = others[name].shape
        if shape[INDEXER[name] + 1 :][:1] != (tokens,):
            raise ValueError(f"{name} has shape {shape} for {tokens} tokens")
    if "batch" not in layer:
        return others, batch.pop() if batch else 0, 0
    specs = others | expected_tensors(layer, policy, own.sliding_window)
    found = layer["kv_heads"], layer["key_dim"], layer["value_dim"]
    _check_shape(found, own.shape)
    return specs, layer["batch"], tokens


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
        if length != keys.shape[2]:
            raise ValueError(f"it holds {keys.shape[2]} keys and says {length}")
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


def _check_beside(found: Sequence[Mapping[str, TensorSpec]], model: Sequence[ModelLayer]) -> None:
    """Refuse layers that lack what their model keeps beside keys and values, or hold other shapes.

    Layers after the last that holds anything have seen no tokens yet.
    """
    last = max((index for index, specs in enumerate(found) if specs), default=-1)
    of_kind: dict[tuple[str, frozenset[str]], tuple[int, dict[str, TensorSpec]]] = {}
    for index, (specs, own) in enumerate(zip(found[: last + 1], model, strict=False)):
        kinds = {name: name.partition(".")[0] for name in specs}
        beside = {
            name: specs[name]
            for name, kind in kinds.items()
            if own.cross or kind in (*STATES, *INDEXER)
        }
        missing = own.keeps - set(kinds.values())
        if missing:
            raise ValueError(f"layer {index}: it has no {sorted(missing)}")
        for name, spec in beside.items():
            known = own.convolutions if kinds[name] == "conv_states" else None
            if known and spec.shape[1:] not in known:
                raise ValueError(
                    f"layer {index}: {name} has shape {spec.shape}, expected (channels, columns) "
                    f"among {sorted(known)}"
                )
        first, others = of_kind.setdefault((own.kind, own.keeps), (index, beside))
        complete = own.keeps or own.cross
        names = beside.keys() | others.keys() if complete else beside.keys() & others.keys()
        differ = {name for name in names if beside.get(name) != others.get(name)}
        if differ:
            raise ValueError(
                f"layer {index}: {sorted(differ)} differ in shape or dtype from those of layer "
                f"{first}"
            )


def _spec(name: str, shape: Any, dtype: Any) -> TensorSpec:
    dtypes = ("I64",) if name == "indexer_position_ids" else FLOATS
    if type(shape) is not list or len(shape) < 2 or dtype not in dtypes:
        raise TypeError(f"{name} has shape {shape!r} and dtype {dtype!r}")
    if not all(type(n) is int and 1 <= n <= MOST for n in shape):
        raise TypeError(f"{name} has shape {shape!r}")
    return TensorSpec(tuple(shape), dtype)
