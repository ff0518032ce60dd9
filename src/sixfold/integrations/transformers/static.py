"""A static layer behind transformers' cache-layer interface."""

from typing import Any, NoReturn

import torch
from torch import Tensor

from sixfold.cache import StaticLayer
from sixfold.errors import SixfoldError
from sixfold.integrations.transformers.attention import StaticHandle
from sixfold.integrations.transformers.layer import TurboQuantLayer


class StaticTurboQuantLayer(TurboQuantLayer):
    """One attention layer of fixed size: it decodes, a token a step."""

    is_croppable = False
    # Whether tokens held came with a graph, which is not kept.
    detached: bool

    def __init__(self, layer: TurboQuantLayer, max_tokens: int) -> None:
        """Copy the tokens of `layer`.

        Raises:
            SixfoldError: They cannot be held by a `StaticLayer`, or are not attended on codes.
        """
        super().__init__(layer.policy, layer.sliding_window, layer.fused)
        self.key_map = layer.key_map
        if layer.store is None or not layer.fused:
            raise SixfoldError(
                "a static cache attends on codes: make the cache with TurboQuantCache.for_model, "
                "for a model whose attention it replaces, and prefill it first."
            )
        # Few tokens, and those that `update` was given by hand, are no codes yet.
        store = layer.store.fork()
        store.compress(now=True)
        self.static = StaticLayer(store, max_tokens)
        self.detached = store.detached
        self.device, self.dtype = store.padding.device, store.window.keys.dtype
        self.is_initialized = True

    @property
    def tokens(self) -> StaticLayer:
        """What holds the tokens."""
        return self.static

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Add tokens; returns a handle for the fused attention."""
        if torch.is_autocast_enabled(key_states.device.type):
            key_states = key_states.to(self.static.window_keys.dtype)
            value_states = value_states.to(self.static.window_values.dtype)
        self.static.append(key_states, value_states)
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            self.detached = True
        handle = StaticHandle(self.static, self.detached)
        return handle, handle

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As many columns as there can be tokens, those let go of included."""
        return self.static.evicted + self.static.max_tokens, 0

    def get_seq_length(self) -> Any:
        """Tokens seen a sequence, on the device."""
        return self.static.count + self.static.evicted

    def get_max_length(self) -> int:
        """The tokens there is room for."""
        return self.static.max_tokens

    def refuse(self, *_: Any, **__: Any) -> NoReturn:
        """Say what to do instead.

        Raises:
            SixfoldError: Always.
        """
        raise SixfoldError(
            "a static cache only decodes: crop, select, fork, move or save the cache it was made "
            "from, then call .static(max_tokens) again."
        )

    def move(self, device: torch.device | None, dtype: torch.dtype | None = None) -> None:
        """Stay: hosts (accelerate's offloading) move what is where it should be.

        Raises:
            SixfoldError: To another device, or dtype.
        """
        own = self.device
        there = device is None or (device.type == own.type and device.index in (None, own.index))
        if not there or dtype not in (None, self.dtype):
            self.refuse()

    def dense(self) -> NoReturn:
        """Say what to do instead."""
        self.refuse()

    adopt = crop = reorder_cache = batch_select_indices = batch_repeat_interleave = refuse
    offload = prefetch = fork = reset = check_crop = activate_past_recording = refuse
    __getstate__ = refuse
