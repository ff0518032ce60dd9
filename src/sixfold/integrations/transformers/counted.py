"""What of a cache knows transformers' layers by their numbers, and counts their states."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin

from sixfold._surroundings import outside_inference_mode
from sixfold.arguments import dense, shown, whole
from sixfold.errors import OutOfRangeError, SixfoldError, UnsupportedModelError
from sixfold.integrations.transformers.attention import untraced_growth
from sixfold.integrations.transformers.combined import replace_states
from sixfold.integrations.transformers.config import STATES_IN_MODULES, decoder_config
from sixfold.integrations.transformers.layer import TurboQuantLayer
from sixfold.integrations.transformers.passes import ForwardPass
from sixfold.integrations.transformers.static import StaticTurboQuantLayer


class CountedCache(Cache):
    """A cache that knows how far a forward pass has come, in layers with states, too.

    Attributes:
        config: Of the model.
    """

    config: PreTrainedConfig
    _pass: ForwardPass

    @property
    def is_initialized(self) -> bool:
        """Whether all layers of keys and values hold tokens: some models tell a prompt by it."""
        all_layers: list[Any] = self.layers
        layers = [x for x in all_layers if x.supports_early_init or isinstance(x, TurboQuantLayer)]
        return bool(layers) and all(x.is_initialized for x in layers)

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        """Replace a convolution state; like `update`, it notices an interrupted forward pass.

        Raises:
            SixfoldError: A forward pass was interrupted, the layer has no such state, or it is no
                dense tensor.
        """
        self._enter_state(layer_idx, "conv", state_idx, conv_states)
        return super().update_conv_state(conv_states, layer_idx, state_idx, **kwargs)

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        """Replace a recurrent state; like `update`, it notices an interrupted forward pass.

        Raises:
            SixfoldError: A forward pass was interrupted, the layer has no such state, or it is no
                dense tensor.
        """
        self._enter_state(layer_idx, "recurrent", state_idx, recurrent_states)
        return super().update_recurrent_state(recurrent_states, layer_idx, state_idx, **kwargs)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """A convolution state, which a model may change in place; None of a layer without tokens.

        Raises:
            SixfoldError: A forward pass was interrupted after it had changed states in place.
        """
        state: Tensor | None = super().get_conv_state(layer_idx, state_idx)
        self._lend(layer_idx, "conv", state_idx, state)
        return state

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """A recurrent state, which a model may change in place; None of a layer without tokens.

        Raises:
            SixfoldError: A forward pass was interrupted after it had changed states in place.
        """
        state: Tensor | None = super().get_recurrent_state(layer_idx, state_idx)
        self._lend(layer_idx, "recurrent", state_idx, state)
        return state

    # What a pass has done is Python's business, also where a model is compiled.
    @untraced_growth
    def _enter_state(self, layer: int, kind: str, number: int, state: Tensor) -> None:
        layer = self._with_states(layer, number, state)
        self._pass.enter_state(self.layers, layer, kind, number)

    @untraced_growth
    def _lend(self, layer: int, kind: str, number: int, state: Tensor | None) -> None:
        self._pass.lend(self.layers, self._number(layer), kind, number, state)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Tokens that a layer has seen, of a static one on its device; 0 of none."""
        return super().get_seq_length(self._number_or_none(layer_idx))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Tokens that the mask of a layer must cover, and the position of the first of them."""
        if type(query_length) is not int and not torch.compiler.is_compiling():
            query_length = whole("query_length", query_length)
        sizes: tuple[int, int] = super().get_mask_sizes(
            query_length, self._number_or_none(layer_idx)
        )
        return sizes

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Most tokens that a layer can hold, or any layer; -1 without a limit."""
        number = None if layer_idx is None else self._number_or_none(layer_idx)
        length: int = super().get_max_length(number)
        return length

    def _number_or_none(self, layer: Any) -> int:
        """The number of a layer, or one beyond the last: transformers asks for such, too."""
        if type(layer) is int and layer >= 0:
            return layer
        number = whole("the number of a layer", layer, -(2**63))
        return number if number >= len(self.layers) else self._number(number)

    def _with_states(self, layer: Any, state: Any, value: Any) -> int:
        """The number of a layer, which has the state of that number."""
        dense("a state", value)
        number = self._number(layer)
        states = getattr(self.layers[number], "has_previous_state", {})
        if not (type(state) is int and state in states):
            raise SixfoldError(
                f"layer {number} is a {type(self.layers[number]).__name__}, which has no "
                f"convolution or recurrent state of the number {shown(state)}."
            )
        return number

    def _number(self, layer: Any) -> int:
        """The number of a layer, counted from the first."""
        count = len(self.layers)
        if type(layer) is int and 0 <= layer < count:
            return layer
        number = whole("the number of a layer", layer, -(2**63))
        if not -count <= number < count:
            raise OutOfRangeError(f"layer {number} does not exist: the cache has {count} layers.")
        return number % count

    @property
    def _has_states(self) -> bool:
        """Whether what a layer holds cannot be told by its tokens."""
        return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self.layers)

    def _check_states(self) -> None:
        self._pass.check_finished(shortening=True)
        if self._pass.spoiled(self.layers):
            raise SixfoldError(
                "convolution and recurrent states that an interrupted forward pass has replaced "
                "are gone: reset the cache, and prefill again."
            )

    def _check_carried(self, operation: str) -> None:
        """Refuse what would leave states behind that a model keeps elsewhere.

        Raises:
            UnsupportedModelError: It is such a model.
        """
        kind = decoder_config(self.config).model_type
        if kind in STATES_IN_MODULES:
            raise UnsupportedModelError(
                f"models of the type {kind!r} keep the states of their recurrent layers in "
                f"themselves, not in a cache: {operation} would leave those as they are. Use one "
                "cache at a time, and prefill again instead."
            )

    def _through_all(self, operation: str) -> AbstractContextManager[None]:
        """For what changes the sequences of one layer after the other."""
        self._check_carried(operation)
        self._refuse_static()
        return self._pass.through_all(operation)

    def _refuse_static(self) -> None:
        for layer in self.layers:
            if isinstance(layer, StaticTurboQuantLayer):
                layer.refuse()

    @outside_inference_mode
    def _own_states(self) -> None:
        """States that can be changed in place, in inference mode or not."""
        for layer in self.layers:
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                replace_states(layer, lambda x: x.clone() if x.is_inference() else x)
