"""What a cache asks of one layer, of whichever kind it is."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
)

from sixfold.arguments import sequence, shown, whole
from sixfold.cache import CachePolicy, LayerShape, uncompressed_nbytes
from sixfold.errors import ShapeError, SixfoldError, UnsupportedModelError
from sixfold.integrations.transformers.combined import (
    STATES,
    HybridTurboQuantLayer,
    IndexedTurboQuantLayer,
    replace_states,
)
from sixfold.integrations.transformers.config import COMPRESSED_TYPES, CROSS_ATTENTION
from sixfold.integrations.transformers.layer import TurboQuantLayer, forked
from sixfold.integrations.transformers.static import StaticTurboQuantLayer


class CrossAttentionLayer(DynamicLayer):
    """Keys and values of something else than the text, such as an image.

    Attributes:
        parts: After how many tokens of the text each arrived, and how many keys it has. What
            another cache has brought is not among them.
    """

    parts: tuple[tuple[int, int], ...] = ()

    def arrived(self, after: int, keys: int) -> None:
        """Note that `update` has added `keys` keys after so many tokens of the text."""
        self.parts = (*self.parts, (after, keys))

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing: the tokens that are forgotten are the text's."""

    def keep_text(self, tokens: int) -> None:
        """Forget what arrived after the first `tokens` tokens of the text."""
        gone = sum(keys for after, keys in self.parts if after >= tokens)
        self.parts = tuple(part for part in self.parts if part[0] < tokens)
        if not tokens or gone == self.get_seq_length():
            self.reset()
        else:
            super().crop(-gone)


def static_layer(layer: Any, max_tokens: int) -> StaticTurboQuantLayer:
    """A static layer of the same tokens.

    Raises:
        SixfoldError: It is static, not compressed, too short, too long, or more than attention.
    """
    if isinstance(layer, StaticTurboQuantLayer):
        layer.refuse()
    if not isinstance(layer, TurboQuantLayer):
        raise UnsupportedModelError(
            f"a static cache needs every layer compressed, this one has a {type(layer).__name__}: "
            "skip no layers, or let the cache grow."
        )
    if type(layer) is not TurboQuantLayer:
        raise UnsupportedModelError(
            "a static cache holds keys and values only, this model's layers have a recurrent state "
            "or an indexer as well: let the cache grow."
        )
    return StaticTurboQuantLayer(layer, max_tokens)


def layer_policies(
    count: int,
    policy: CachePolicy,
    skip_layers: Sequence[int],
    per_layer: Mapping[int, Mapping[str, Any]],
) -> list[CachePolicy | None]:
    """The policy of every layer; None for layers kept uncompressed.

    Raises:
        SixfoldError: A layer number is out of range, or an override names no policy field.
    """
    skipped = [_number(index, count) for index in sequence("skip_layers", skip_layers)]
    if not isinstance(per_layer, Mapping):
        raise SixfoldError(
            f'per_layer must be a mapping such as {{0: {{"key_bits": 8}}}}, got {shown(per_layer)}'
        )
    policies: list[CachePolicy | None] = [policy] * count
    for key, fields in per_layer.items():
        index = _number(key, count)
        if not isinstance(fields, Mapping):
            raise SixfoldError(
                f"per_layer[{index}] must be a mapping of policy fields, got {shown(fields)}"
            )
        unknown = set(fields) - set(policy.to_dict())
        if unknown:
            raise SixfoldError(
                f"per_layer[{index}] has unknown fields {sorted(map(str, unknown))}; "
                f"expected some of {sorted(policy.to_dict())}."
            )
        policies[index] = CachePolicy(**{**policy.to_dict(), **fields})
    for index in skipped:
        policies[index] = None
    return policies


def _number(index: Any, count: int) -> int:
    number = whole("the number of a layer", index, -(2**63))
    if not -count <= number < count:
        raise SixfoldError(f"layer {number} does not exist: the model has {count} layers.")
    return number


def cache_layer(kind: str, kwargs: dict[str, Any], policy: CachePolicy | None) -> Any:
    """An empty layer of a type that `layer_types` names; uncompressed without a policy.

    Raises:
        UnsupportedModelError: Transformers knows no such type.
    """
    if kind == CROSS_ATTENTION:
        return CrossAttentionLayer()  # type: ignore[no-untyped-call]
    if kind in COMPRESSED_TYPES and policy is not None:
        cls = _LAYERS.get(kind, TurboQuantLayer)
        return cls(policy, fused=False, **{"sliding_window": None, **kwargs})
    if kind not in DYNAMIC_LAYER_TYPE_MAPPING:
        raise UnsupportedModelError(
            f"layer type {kind!r} is unknown to this version of transformers' caches."
        )
    return DYNAMIC_LAYER_TYPE_MAPPING[kind](**kwargs)


_LAYERS = {
    "hybrid": HybridTurboQuantLayer,
    "hybrid_sliding": HybridTurboQuantLayer,
    "indexed_attention": IndexedTurboQuantLayer,
}


def select_sequences(layer: Any, rows: Tensor) -> None:
    """Keep, repeat or reorder sequences of the batch, in a layer of any kind."""
    if _select_states(layer, lambda state: state[rows.to(state.device)]):
        layer.batch_select_indices(rows)


def repeat_sequences(layer: Any, repeats: int) -> None:
    """Repeat every sequence of the batch, in a layer of any kind."""
    if _select_states(layer, lambda state: state.repeat_interleave(repeats, 0)):
        layer.batch_repeat_interleave(repeats)


def _select_states(layer: Any, change: Callable[[Tensor], Tensor]) -> bool:
    """Change the states of transformers' own layers, which forget them; whether that is not all."""
    own = isinstance(layer, LinearAttentionCacheLayerMixin)
    if not own or isinstance(layer, TurboQuantLayer):
        return True
    replace_states(layer, change)
    return isinstance(layer, DynamicLayer)


def layer_tensors(layer: Any) -> list[Tensor]:
    """Every tensor that a layer holds."""
    if isinstance(layer, TurboQuantLayer):
        return layer.tensors()
    held: list[Any] = []
    for attribute in vars(layer).values():
        held += attribute.values() if isinstance(attribute, dict) else [attribute]
    return [x for x in held if isinstance(x, Tensor)]


def move_layer(layer: Any, device: torch.device | None, dtype: torch.dtype | None) -> None:
    """Move everything held, where a device is given, and convert it, where a dtype is."""
    if isinstance(layer, TurboQuantLayer):
        layer.move(device, dtype)
        return
    if device is not None:
        layer.device = device
    for name in ("keys", "values"):
        if isinstance(x := getattr(layer, name, None), Tensor):
            setattr(layer, name, x.to(device or x.device, dtype))
    for name in STATES:
        states = getattr(layer, name, {})
        moved = {i: x.to(device or x.device) for i, x in states.items() if x is not None}
        states.update(moved)


def follow(layer: Any, device: torch.device) -> None:
    """Move what an uncompressed layer holds to where its model's layer is."""
    held = getattr(layer, "keys", None)
    if isinstance(held, Tensor) and held.device != device:
        move_layer(layer, device, None)


def check_dtype(layer: Any, keys: Tensor) -> None:
    """Refuse new keys that an uncompressed layer would not give back in their dtype.

    Raises:
        ShapeError: What it holds is of another dtype, and more exact.
    """
    held = getattr(layer, "keys", None)
    if held is None or held.dtype is keys.dtype or not held.numel():
        return
    # Autocast brings queries and keys together.
    autocast = torch.is_autocast_enabled(keys.device.type)
    if not autocast and torch.promote_types(held.dtype, keys.dtype) is not keys.dtype:
        raise ShapeError(
            f"this layer holds keys of {held.dtype}, got {keys.dtype}: convert what it holds, as "
            f"cache.to(dtype={keys.dtype}) does, when the dtype of the model changes."
        )


def sequences(layer: Any) -> int:
    """How many sequences a layer holds; 0 of an empty one."""
    if isinstance(layer, TurboQuantLayer):
        return len(layer.store.padding) if layer.store is not None else 0
    states = (x for kind in STATES for x in getattr(layer, kind, {}).values())
    held = (getattr(layer, "keys", None), *states)
    return next((len(x) for x in held if isinstance(x, Tensor) and x.numel()), 0)


def check_crop(layer: Any, tokens_to_remove: int) -> None:
    """Refuse what a layer's `crop` would, or should; changes nothing.

    Raises:
        SixfoldError: The layer cannot go back by so many tokens.
    """
    if isinstance(layer, TurboQuantLayer):
        return layer.check_crop(tokens_to_remove)
    recurrent = getattr(layer, "is_recurrent_states_initialized", {})
    if tokens_to_remove and any(recurrent.values()):
        raise SixfoldError(
            f"cannot remove tokens: the recurrent state of a {type(layer).__name__} cannot be "
            "taken back; fork the cache before generating tokens that may be removed."
        )
    try:
        forked(layer).crop(tokens_to_remove)
    except (RuntimeError, ValueError) as error:
        raise SixfoldError(f"cannot remove tokens: {error}") from error


def uncompressed_bytes(layer: Any) -> int:
    """Bytes of a layer in 16 bits; what is not floating point counts as it is."""
    compressed = isinstance(layer, TurboQuantLayer)
    others = layer.extra_tensors().values() if compressed else layer_tensors(layer)
    nbytes = sum(2 * x.numel() if x.is_floating_point() else x.nbytes for x in others)
    held = layer.tokens if compressed else None
    if held is None:
        return nbytes
    keys, values = held.window.keys, held.window.values
    shape = LayerShape(keys.shape[1], keys.shape[3], values.shape[3], layer.sliding_window)
    return nbytes + uncompressed_nbytes([shape], tokens=held.length, batch=keys.shape[0])
