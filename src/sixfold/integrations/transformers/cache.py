"""`TurboQuantCache`: a transformers cache whose attention layers hold codes."""

import copy
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
)

from sixfold.cache import CachePolicy, LayerShape, uncompressed_nbytes
from sixfold.cache.policy import SPLITS
from sixfold.errors import SixfoldError, UnsupportedModelError
from sixfold.integrations.transformers.attention import NAME, NO_WEIGHTS, register
from sixfold.integrations.transformers.combined import (
    STATES,
    HybridTurboQuantLayer,
    IndexedTurboQuantLayer,
)
from sixfold.integrations.transformers.config import (
    COMPRESSED_TYPES,
    CROSS_ATTENTION,
    coded_dims,
    fusable_layers,
    layer_types,
)
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
        any other cache. Layers whose attention computes with cached tensors itself (Falcon,
        multi-head latent attention, layers whose keys other layers share) get them dequantized;
        then `fused` is False and a warning says so.

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
        fusable = fusable_layers(model, len(cache))
        for index, layer in enumerate(cache.layers):
            if isinstance(layer, TurboQuantLayer):
                layer.fused = index in fusable
        if any(layer.fused for layer in cache.compressed_layers):
            register()
            if model.config._attn_implementation != NAME:
                model.set_attn_implementation(NAME)
        cache._warn_of(model)
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

    def _warn_of(self, model: PreTrainedModel) -> None:
        """Say once what a user of `for_model` may not expect."""
        held = len(self.compressed_layers)
        dense = sum(not layer.fused for layer in self.compressed_layers)
        name = type(model).__name__
        if dense:
            which = "its attention" if dense == held else f"attention in {dense} of {held} layers"
            warnings.warn(
                f"{name}: {which} computes with cached keys and values itself, so they are "
                "dequantized for it at every step: as small in memory, but slower than attention "
                "on codes.",
                stacklevel=3,
            )
        if getattr(model.config, "output_attentions", False) and dense < held:
            warnings.warn(NO_WEIGHTS, stacklevel=3)

    @property
    def is_linear(self) -> list[bool]:
        """Which layers have no attention; transformers makes its masks for the others."""
        attention = (TurboQuantLayer, DynamicLayer)
        return [
            isinstance(layer, LinearAttentionCacheLayerMixin) and not isinstance(layer, attention)
            for layer in self.layers
        ]

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None, Tensor | None]]:
        """Keys, values and sliding window of every layer, dequantized, as of a `DynamicCache`."""
        for index, layer in enumerate(self.layers):
            window = getattr(layer, "sliding_window", None)
            yield *self[index], None if window is None else torch.tensor(window)

    def __getitem__(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """Keys and values of one layer, dequantized; None where there are none."""
        held = self.layers[layer]
        if isinstance(held, TurboQuantLayer):
            return held.dense()
        return getattr(held, "keys", None), getattr(held, "values", None)

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
            FormatError: A layer is of a kind that cannot be stored.
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
            check_weights: Refuse a model of the same shape with other weights.

        Raises:
            FormatError: Not such a file, another model's, cut short, or damaged.
        """
        policies, layers, tensors = load_layers(path, model, check_weights)
        fields = {index: p.to_dict() for index, p in enumerate(policies) if p is not None}
        skipped = [index for index, p in enumerate(policies) if p is None]
        cache = cls.for_model(model, per_layer=fields, skip_layers=skipped)
        for index, (layer, description) in enumerate(zip(cache.layers, layers, strict=True)):
            prefix = f"layers.{index}."
            held = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            fill(layer, description, held)
        return cache.to(model.device)

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
    if kind == CROSS_ATTENTION:
        return DynamicLayer()
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
    for name in STATES:
        states = getattr(layer, name, {})
        states.update({i: x.to(device) for i, x in states.items() if x is not None})


def _uncompressed(layer: Any) -> int:
    """Bytes of a layer in 16 bits; what is not floating point counts as it is."""
    compressed = isinstance(layer, TurboQuantLayer)
    others = layer.extra_tensors().values() if compressed else _tensors(layer)
    nbytes = sum(2 * x.numel() if x.is_floating_point() else x.nbytes for x in others)
    held = layer.tokens if compressed else None
    if held is None:
        return nbytes
    keys, values = held.window.keys, held.window.values
    shape = LayerShape(keys.shape[1], keys.shape[3], values.shape[3], layer.sliding_window)
    return nbytes + uncompressed_nbytes([shape], tokens=held.length, batch=keys.shape[0])


def _forked(layer: Any) -> Any:
    if isinstance(layer, TurboQuantLayer):
        return layer.fork()
    # Keys and values are replaced as they grow; convolution and recurrent states change in place.
    return copy.deepcopy(layer) if hasattr(layer, "conv_states") else copy.copy(layer)
