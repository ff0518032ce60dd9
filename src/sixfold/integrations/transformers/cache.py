"""`TurboQuantCache`: a transformers cache whose attention layers hold codes."""

import copy
import weakref
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, Cache

from sixfold.cache import CachePolicy, LayerShape, uncompressed_nbytes
from sixfold.cache.policy import SPLITS
from sixfold.errors import FormatError, SixfoldError, UnsupportedModelError
from sixfold.integrations.transformers.attention import NAME, register
from sixfold.integrations.transformers.config import (
    COMPRESSED_TYPES,
    attends_through_interface,
    coded_dims,
    layer_types,
    shared_layers,
)
from sixfold.integrations.transformers.devices import execution_device, layer_devices
from sixfold.integrations.transformers.layer import TurboQuantLayer
from sixfold.integrations.transformers.static import StaticTurboQuantLayer
from sixfold.integrations.transformers.storage import (
    fill,
    load_layers,
    save_cache,
)
from sixfold.packing import Bits


class TurboQuantCache(Cache):
    """A key-value cache that holds 2-4 bits a value instead of 16.

    ``TurboQuantCache.for_model(model, bits=4)`` attends on the codes. The plain constructor works
    with any attention implementation by handing out dequantized tensors, one layer at a time.
    Layers that are not softmax attention (linear attention, convolutions) stay as they are.

    Args:
        config: The model's config.
        bits: Bits a coordinate of keys and values: 1 to 8, 2.5 or 3.5. 3.5 are spent as 4 on keys
            and 3 on values, 3 as 3.5 and 2.5, where that takes no more bytes (docs/recipe.md).
        key_bits: Bits of the keys. Values then have `bits`, if not told otherwise.
        value_bits: Bits of the values. Keys then have `bits`, if not told otherwise.
        sink_tokens: First tokens of every sequence kept in the model's dtype.
        recent_window: Last tokens kept in the model's dtype (and up to 63 more, until a page of
            64 is full).
        center_keys: Subtract the mean key of every head; exact, estimated online.
        equalize_keys: Scale key channels to the queries they meet; exact, estimated online.
        skip_layers: Layers kept uncompressed; negative numbers count from the last.
        per_layer: `CachePolicy` fields that differ for some layers, such as
            ``{0: {"key_bits": 8}}``.
        seed: Seed of the rotation.

    Raises:
        UnsupportedModelError: The model has no key-value cache that can be compressed.
        SixfoldError: An option is out of range.

    Source: arXiv:2504.19874; centring and equalization: docs/format.md and cache/affine.py.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        bits: Bits = 4,
        *,
        key_bits: Bits | None = None,
        value_bits: Bits | None = None,
        sink_tokens: int = 4,
        recent_window: int = 64,
        center_keys: bool = True,
        equalize_keys: bool = True,
        skip_layers: Sequence[int] = (),
        per_layer: Mapping[int, Mapping[str, Any]] | None = None,
        seed: int = 0,
    ) -> None:
        policy = CachePolicy.spending(
            bits,
            coded_dims(config) if bits in SPLITS else (),
            key_bits=key_bits,
            value_bits=value_bits,
            sink_tokens=sink_tokens,
            recent_window=recent_window,
            center_keys=center_keys,
            equalize_keys=equalize_keys,
            seed=seed,
        )
        self.config = config
        self._model: weakref.ref[PreTrainedModel] | None = None
        types, kwargs = layer_types(config)
        policies = layer_policies(len(types), policy, skip_layers, per_layer or {})
        super().__init__(
            layers=[_cache_layer(*layer) for layer in zip(types, kwargs, policies, strict=True)]
        )

    @classmethod
    def for_model(cls, model: PreTrainedModel, bits: Bits = 4, **options: Any) -> Self:
        """A cache whose attention runs on the codes.

        Switches `model` to ``attn_implementation="sixfold"``, which computes exact attention for
        any other cache. Where a model's attention computes with cached tensors itself (Falcon,
        multi-head latent attention, layers whose keys other layers share) `fused` is False and
        tensors are handed out dequantized.

        Args:
            model: A decoder-only model.
            bits: Bits a coordinate.
            options: Any argument of `TurboQuantCache`.

        Raises:
            UnsupportedModelError: The model has no key-value cache that can be compressed.
        """
        if not isinstance(model, PreTrainedModel):
            raise UnsupportedModelError(
                f"expected a transformers PreTrainedModel, got {type(model).__name__}; for another "
                "framework use sixfold.cache.CompressedLayer."
            )
        cache = cls(model.config, bits, **options)
        if attends_through_interface(model):
            register()
            if model.config._attn_implementation != NAME:
                model.set_attn_implementation(NAME)
            shared = shared_layers(model.config)
            for index, layer in enumerate(cache.layers):
                if isinstance(layer, TurboQuantLayer):
                    layer.fused = index not in shared
        cache._model = weakref.ref(model)
        return cache

    @property
    def compressed_layers(self) -> list[TurboQuantLayer]:
        """The layers that hold codes."""
        return [layer for layer in self.layers if isinstance(layer, TurboQuantLayer)]

    @property
    def fused(self) -> bool:
        """Whether attention runs on the codes."""
        return all(layer.fused for layer in self.compressed_layers)

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor held: codes, scales, windows, maps, tables, slack; each once."""
        storages = [x.untyped_storage() for x in self.tensors()]
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())

    @property
    def uncompressed_nbytes(self) -> int:
        """Bytes the same tokens take in a 16-bit cache."""
        return sum(_uncompressed(layer) for layer in self.layers)

    @property
    def compression_ratio(self) -> float:
        """16-bit bytes of the same tokens ÷ bytes held; 1 while empty."""
        return self.uncompressed_nbytes / self.nbytes if self.nbytes else 1.0

    def tensors(self) -> list[Tensor]:
        """Every tensor held by any layer."""
        return [x for layer in self.layers for x in _tensors(layer)]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens in every layer, or in none.

        Raises:
            SixfoldError: The number is positive, a sliding window or a convolution has moved on, or
                a layer's recurrent state cannot be taken back.
        """
        for layer in self.layers:
            _check_crop(layer, tokens_to_remove)
        super().crop(tokens_to_remove)

    def fork(self) -> Self:
        """A cache that continues from the same tokens; pages are shared, not copied."""
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.layers = [_forked(layer) for layer in self.layers]
        return twin

    def static(self, max_tokens: int) -> "TurboQuantCache":
        """The same tokens in memory that never moves: for `torch.compile` and CUDA graphs.

        The copy decodes one token of every sequence a step, up to `max_tokens` of them, all that is
        held included, and can do nothing else. Its steps wait for nothing on the device; pass the
        model `position_ids`, lest it ask for the length.

        Args:
            max_tokens: Tokens a sequence to make room for.

        Raises:
            SixfoldError: A layer has not compressed a page yet, is not attended on its codes, or
                holds more tokens than that.
        """
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.layers = [_static(layer, max_tokens) for layer in self.layers]
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A fork: what transformers' guides do with `copy.deepcopy` to reuse a prefix."""
        return self.fork()

    def save(self, path: str | PathLike[str]) -> None:
        """Write the cache to a file that `load` reads (docs/format.md); nothing is pickled.

        Args:
            path: Where to. An existing file is replaced in one step, once the new one is whole.

        Raises:
            FormatError: A layer is of a kind that cannot be stored, or holds numbers that no reader
                would take, such as NaN.
            OSError: The file cannot be written.
        """
        for layer in self.layers:
            if isinstance(layer, StaticTurboQuantLayer):
                layer.refuse()
        model = self._model() if self._model else None
        save_cache(self.layers, self.config, model, path)

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        model: PreTrainedModel,
        *,
        check_weights: bool = True,
    ) -> Self:
        """Read a cache that `save` wrote, for attention on its codes by `model`.

        Args:
            path: The file.
            model: The model that filled the cache.
            check_weights: Refuse a model of the same shape with other weights or adapters. Every
                byte of them is read: 0.2 s for 135 million weights, 0.9 s for 1.5 billion in
                bfloat16, measured on a CPU.

        Raises:
            FormatError: Not such a file, another model's, cut short, or damaged; or it holds
                numbers that no cache holds (docs/format.md, section 8).
            OSError: The file cannot be read.
        """
        policies, layers, tensors = load_layers(path, model, check_weights)
        fields = {index: p.to_dict() for index, p in enumerate(policies) if p is not None}
        skipped = [index for index, p in enumerate(policies) if p is None]
        cache = cls.for_model(model, per_layer=fields, skip_layers=skipped)
        for index, (layer, description) in enumerate(zip(cache.layers, layers, strict=True)):
            prefix = f"layers.{index}."
            held = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            try:
                fill(layer, description, held)
            except FormatError as error:
                raise FormatError(f"{path}, layer {index}: {error}") from error
        devices = layer_devices(model)
        for index, layer in enumerate(cache.layers):
            _move(layer, devices.get(index, execution_device(model)))
        return cache

    def to(self, device: torch.device | str) -> Self:
        """Move everything held to `device`."""
        for layer in self.layers:
            _move(layer, torch.device(device))
        return self


def _static(layer: Any, max_tokens: int) -> StaticTurboQuantLayer:
    if isinstance(layer, StaticTurboQuantLayer):
        layer.refuse()
    if not isinstance(layer, TurboQuantLayer):
        raise UnsupportedModelError(
            f"a static cache needs every layer compressed, this one has a {type(layer).__name__}: "
            "skip no layers, or let the cache grow."
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
    for index in (*skip_layers, *per_layer):
        if not -count <= index < count:
            raise SixfoldError(f"layer {index} does not exist: the model has {count} layers.")
    policies: list[CachePolicy | None] = [policy] * count
    for index, fields in per_layer.items():
        unknown = set(fields) - set(policy.to_dict())
        if unknown:
            raise SixfoldError(
                f"per_layer[{index}] has unknown fields {sorted(unknown)}; "
                f"expected some of {sorted(policy.to_dict())}."
            )
        policies[index] = CachePolicy(**{**policy.to_dict(), **fields})
    for index in skip_layers:
        policies[index] = None
    return policies


def _cache_layer(kind: str, kwargs: dict[str, Any], policy: CachePolicy | None) -> Any:
    if kind in COMPRESSED_TYPES and policy is not None:
        return TurboQuantLayer(policy, kwargs.get("sliding_window"), fused=False)
    if kind not in DYNAMIC_LAYER_TYPE_MAPPING:
        raise UnsupportedModelError(
            f"layer type {kind!r} is unknown to this version of transformers' caches."
        )
    return DYNAMIC_LAYER_TYPE_MAPPING[kind](**kwargs)


_STATES = ("conv_states", "recurrent_states")


def _tensors(layer: Any) -> list[Tensor]:
    if isinstance(layer, TurboQuantLayer):
        return layer.tensors()
    held: list[Any] = []
    for attribute in vars(layer).values():
        held += attribute.values() if isinstance(attribute, dict) else [attribute]
    return [x for x in held if isinstance(x, Tensor)]


def _move(layer: Any, device: torch.device) -> None:
    if isinstance(layer, TurboQuantLayer):
        layer.move(device)
        return
    layer.device = device
    for name in ("keys", "values"):
        if isinstance(getattr(layer, name, None), Tensor):
            setattr(layer, name, getattr(layer, name).to(device))
    for name in _STATES:
        states = getattr(layer, name, {})
        states.update({i: x.to(device) for i, x in states.items() if x is not None})


def _check_crop(layer: Any, tokens_to_remove: int) -> None:
    """Refuse what a layer's `crop` would, or should; changes nothing."""
    if isinstance(layer, TurboQuantLayer):
        return layer.check_crop(tokens_to_remove)
    recurrent = getattr(layer, "is_recurrent_states_initialized", {})
    if tokens_to_remove and any(recurrent.values()):
        raise SixfoldError(
            f"cannot remove tokens: the recurrent state of a {type(layer).__name__} cannot be "
            "taken back; fork the cache before generating tokens that may be removed."
        )
    try:
        _forked(layer).crop(tokens_to_remove)
    except (RuntimeError, ValueError) as error:
        raise SixfoldError(f"cannot remove tokens: {error}") from error


def _uncompressed(layer: Any) -> int:
    """Bytes of a layer in 16 bits; states that are not keys and values count as they are."""
    if not isinstance(layer, TurboQuantLayer):
        return sum(2 * x.numel() if x.is_floating_point() else x.nbytes for x in _tensors(layer))
    held = layer.tokens
    if held is None:
        return 0
    keys, values = held.window.keys, held.window.values
    shape = LayerShape(keys.shape[1], keys.shape[3], values.shape[3], layer.sliding_window)
    return uncompressed_nbytes([shape], tokens=held.length, batch=keys.shape[0])


def _forked(layer: Any) -> Any:
    if isinstance(layer, TurboQuantLayer):
        return layer.fork()
    # Keys and values are replaced as they grow; convolution and recurrent states change in place.
    return copy.deepcopy(layer) if hasattr(layer, "conv_states") else copy.copy(layer)
