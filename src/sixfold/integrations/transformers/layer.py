"""One compressed attention layer behind transformers' cache-layer interface."""

import copy
import io
from functools import reduce
from typing import Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from sixfold.arguments import whole
from sixfold.cache import CachePolicy, CompressedLayer, StaticLayer
from sixfold.cache.affine import DEFAULT_FIT, KeyMapFit
from sixfold.cache.code import MakeCode, page_code
from sixfold.cache.state import layer_state, restore_layer
from sixfold.errors import FormatError, SixfoldError, UnsupportedModelError
from sixfold.integrations.transformers.attention import CodesHandle, as_autocast
from sixfold.integrations.transformers.watch import Watch
from sixfold.kernels.types import KeyMap

# A batch is never so large: a mistake that would be noticed by the memory it takes.
MOST_REPEATS = 2**20


class TurboQuantLayer(CacheLayerMixin):
    """One compressed attention layer behind transformers' cache-layer interface."""

    is_croppable = True
    supports_early_init = False

    def __init__(
        self,
        policy: CachePolicy,
        sliding_window: int | None,
        fused: bool,
        make_code: MakeCode = page_code,
        fit: KeyMapFit = DEFAULT_FIT,
    ) -> None:
        # Not the parent's: it would set `keys` and `values`, which are read from the codes.
        self.is_initialized = False
        self.policy = policy
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.fused = fused
        self.make_code, self.fit = make_code, fit
        # Of all sequences; None to fit one to each.
        self.key_map: KeyMap | None = None
        self.record_past = False
        # Whether attention may show the queries that dense keys of this layer meet.
        self.watched = False
        self._watch: Watch | None = None
        self._store: CompressedLayer | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Learn batch, heads, dims, dtype and device from the first tokens.

        Raises:
            UnsupportedModelError: Keys or values have no coordinates.
        """
        if 0 in (key_states.shape[-1], value_states.shape[-1]):
            raise UnsupportedModelError(
                "one of the two tensors that this layer caches is empty (latents without rotary "
                "keys beside them), which Sixfold cannot compress yet: leave such layers as they "
                "are with skip_layers=[...], or use transformers' DynamicCache."
            )
        like, kind = (key_states, value_states), (self.policy, self.sliding_window)
        self.adopt(CompressedLayer(*like, *kind, self.key_map, self.make_code, self.fit))

    @property
    def store(self) -> CompressedLayer | None:
        """What holds the tokens; None while there are none."""
        self.settle()
        return self._store

    @property
    def mapped(self) -> bool:
        """Whether there is a key map: queries that come later change nothing."""
        return self._store is not None and self._store.prefix is not None

    def settle(self) -> bool:
        """Compress tokens that have waited for their queries until now; whether any had."""
        watch, self._watch = self._watch, None
        if watch is None or not watch.unseen:
            return False
        watch.end()
        return True

    def adopt(self, store: CompressedLayer) -> None:
        """Hold `store`, which may have been filled elsewhere."""
        store.record_past = self.record_past
        self._store, self._watch = store, None
        self.device, self.dtype = store.padding.device, store.window.keys.dtype
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Add tokens; returns a handle for the fused attention, or all tokens dequantized."""
        if torch._C._is_any_autocast_enabled():
            key_states, value_states = as_autocast(key_states), as_autocast(value_states)
        if self._store is None:
            self.lazy_initialization(key_states, value_states)
        store = self._store
        assert store is not None
        key_states, value_states = self._reconciled(store, key_states, value_states)
        if self.fused:
            # Compressed when attended: until then the queries are not known.
            store.extend(key_states, value_states)
            handle = CodesHandle(store, key_states.shape[2])
            return handle, handle
        new = key_states.shape[2]
        masked, _ = self.get_mask_sizes(new)
        first = store.length == 0
        store.extend(key_states, value_states)
        held = (key_states, value_states) if first else store.dequantized()
        keys, values = (x[:, :, -masked:] for x in held)
        if self.watched and store.prefix is None:
            self._watch = Watch(store, keys, new)
            return keys, values
        store.compress()
        return keys, values

    def _reconciled(
        self, store: CompressedLayer, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """New tokens and those held on one device, and in one dtype as far as nothing is lost."""
        held = store.window
        if held.keys.device != keys.device:
            # A layer is where its model's layer is.
            self.move(keys.device)
            held = store.window
        if keys.dtype is held.keys.dtype and values.dtype is held.values.dtype:
            return keys, values
        if torch.is_autocast_enabled(keys.device.type):
            return keys.to(held.keys.dtype), values.to(held.values.dtype)
        dtypes = held.keys.dtype, held.values.dtype, keys.dtype, values.dtype
        wide = reduce(torch.promote_types, dtypes)
        if wide is keys.dtype and wide is values.dtype:
            store.to(keys.device, wide)
            self.dtype = wide
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens the mask must cover, and the position of the first of them.

        Transformers makes one mask for all sliding layers: each must want what an uncompressed
        one would, though some hold more (whole pages, or a past that may be cropped back to).
        """
        store = self._store
        if store is None:
            return query_length, 0
        return store.visible + query_length, store.length - store.visible

    def get_seq_length(self) -> int:
        """Tokens seen a sequence."""
        return self._store.length if self._store else 0

    def get_max_length(self) -> int:
        """The sliding window, or -1: no limit."""
        return -1 if self.sliding_window is None else self.sliding_window

    def reset(self) -> None:
        """Forget every token."""
        self._store = self._watch = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens.

        Raises:
            SixfoldError: The number is positive, or a sliding window has moved on.
        """
        self.check_crop(tokens_to_remove)
        # Tokens that wait go as they came: codes of them would stay.
        store, self._watch = self._store, None
        if store is None:
            return
        if -tokens_to_remove >= store.length:
            self.reset()
        else:
            store.crop(-tokens_to_remove)

    def check_crop(self, tokens_to_remove: int) -> None:
        """Refuse what `crop` would; changes nothing.

        Raises:
            SixfoldError: The number is positive, or a sliding window has moved on.
        """
        tokens_to_remove = whole("tokens_to_remove", tokens_to_remove, -(2**63))
        if tokens_to_remove > 0:
            raise SixfoldError(
                f"crop takes minus the number of tokens to remove, got {tokens_to_remove}."
            )
        if self._store is not None:
            self._store.check_crop(-tokens_to_remove)

    def activate_past_recording(self) -> None:
        """Keep what leaves a sliding window until the next `crop` (assisted generation)."""
        self.record_past = True
        if self.store is not None:
            self.store.record_past = True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams: page tables are reordered, codes stay where they are."""
        if self.store is not None:
            self.store.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences of the batch."""
        if self.store is not None:
            self.store.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence; the copies share their pages."""
        if self.store is not None:
            rows = torch.arange(len(self.store.padding), device=self.store.padding.device)
            self.store.select(rows.repeat_interleave(whole("repeats", repeats, 1, MOST_REPEATS)))

    def offload(self) -> None:
        """Move everything held to the CPU."""
        if self.store is not None:
            self.store.to(torch.device("cpu"))

    def prefetch(self) -> None:
        """Move everything held back to the device of the model."""
        if self.store is not None:
            self.store.to(self.device)

    def move(self, device: torch.device | None, dtype: torch.dtype | None = None) -> None:
        """Move everything held, for good; what is not compressed becomes `dtype`, if given."""
        if self.store is not None:
            self.device = device or self.store.padding.device
            self.store.to(self.device, dtype)
            self.dtype = self.store.window.keys.dtype

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """What an uncompressed layer would hold, decoded on every access; None while empty."""
        return self.dense()[0]

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """What an uncompressed layer would hold, decoded on every access; None while empty."""
        return self.dense()[1]

    def dense(self) -> tuple[Tensor | None, Tensor | None]:
        """Keys and values of the visible tokens, [batch, kv_heads, tokens, dim], or None twice."""
        if self.store is None:
            return None, None
        first = self.store.held - self.store.visible
        keys, values = self.store.dequantized()
        return keys[:, :, first:], values[:, :, first:]

    @property
    def tokens(self) -> CompressedLayer | StaticLayer | None:
        """What holds the tokens, if there are any."""
        return self.store

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        return self.tokens.tensors() if self.tokens is not None else []

    def extra_tensors(self) -> dict[str, Tensor]:
        """What is held beside keys and values, by the names that `save` gives it."""
        return {}

    def adopt_extra(self, tensors: dict[str, Tensor]) -> None:
        """Hold what `extra_tensors` gave.

        Raises:
            FormatError: This kind of layer does not hold such a thing.
        """
        for name in tensors:
            raise FormatError(f"this model has no {name!r} beside its keys and values.")

    def fork(self) -> Self:
        """A layer that continues from the same tokens and shares their pages."""
        twin = type(self)(self.policy, self.sliding_window, self.fused)
        store = self.store
        twin.__dict__.update(self.__dict__)
        twin._store = store.fork() if store else None
        return twin

    def __getstate__(self) -> dict[str, Any]:
        # By value, as in a file: processes would share tensors, and write to each other's.
        held, store = self.store, None
        if held is not None:
            store = _saved((*layer_state(held), held.detached))
        key_map = None if self.key_map is None else _saved(self.key_map[:2])
        return {**self.__dict__, "_store": store, "key_map": key_map}

    def __setstate__(self, state: dict[str, Any]) -> None:
        key_map = state.get("key_map")
        self.__dict__.update(state, _store=None, key_map=key_map and KeyMap(*_loaded(key_map)))
        if state["_store"] is not None:
            description, tensors, detached = _loaded(state["_store"])
            spec = self.policy, self.sliding_window, self.key_map
            store = restore_layer(description, tensors, *spec)
            store.detached, store.fit = detached, self.fit
            self.adopt(store)
            self.move(tensors["padding"].device)


def _saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _loaded(value: bytes) -> Any:
    try:
        return torch.load(io.BytesIO(value), weights_only=True)
    except RuntimeError:
        # It was on a device that this machine lacks: a layer goes where its model is by itself.
        return torch.load(io.BytesIO(value), weights_only=True, map_location="cpu")


def forked(layer: Any) -> Any:
    """A copy of any layer that shares with it what neither changes in place."""
    if isinstance(layer, TurboQuantLayer):
        return layer.fork()
    # Keys and values are replaced as they grow; convolution and recurrent states change in place.
    return copy.deepcopy(layer) if hasattr(layer, "conv_states") else copy.copy(layer)
