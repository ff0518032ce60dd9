"""Compressed layers that hold more than keys and values: recurrent states, or an indexer's keys."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from sixfold.cache import CachePolicy
from sixfold.errors import FormatError, SixfoldError
from sixfold.integrations.transformers.layer import TurboQuantLayer

STATES = ("conv_states", "recurrent_states")
INDEXER = {"indexer_keys": 0, "indexer_position_ids": 1}  # and the batch axis of each


def held_beside(layer: Any) -> dict[str, Tensor]:
    """What a layer of ours or of transformers holds beside keys and values, by name."""
    held = {name: getattr(layer, name, None) for name in INDEXER}
    for kind in STATES:
        for index, state in getattr(layer, kind, {}).items():
            held[f"{kind}.{index}"] = state if layer.has_previous_state[index] else None
    return {name: tensor for name, tensor in held.items() if tensor is not None}


def replace_states(layer: Any, change: Callable[[Tensor], Tensor]) -> None:
    """Change every convolution and recurrent state of a layer of ours or of transformers."""
    for kind in STATES:
        states = getattr(layer, kind)
        states.update({i: change(x) for i, x in states.items() if x is not None})


def forget_states(layer: Any) -> None:
    """Let go of the states of a layer, which its own `reset` would keep, and fill with zeros."""
    for kind in STATES:
        states = getattr(layer, kind, {})
        states.update(dict.fromkeys(states))
        begun = getattr(layer, f"is_{kind}_initialized", {})
        begun.update(dict.fromkeys(begun, False))


class HybridTurboQuantLayer(TurboQuantLayer, LinearAttentionLayer):  # type: ignore[misc]
    """Attention beside a state of fixed size (Falcon-H1, Zamba2): that stays as it is."""

    def __init__(
        self,
        policy: CachePolicy,
        sliding_window: int | None,
        fused: bool,
        number_of_states: int = 1,
    ) -> None:
        LinearAttentionLayer.__init__(self, number_of_states)
        TurboQuantLayer.__init__(self, policy, sliding_window, fused)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Of keys and values, both by position, or of a state, by name."""
        kind = TurboQuantLayer if args else LinearAttentionLayer
        kind.lazy_initialization(self, *args, **kwargs)

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether `crop` can put the state back as well."""
        return any(self.is_conv_states_initialized.values()) and not any(
            self.is_recurrent_states_initialized.values()
        )

    def check_crop(self, tokens_to_remove: int) -> None:
        """Refuse what `crop` would; changes nothing.

        Raises:
            SixfoldError: Past states were not recorded, or a recurrent state cannot go back.
        """
        if tokens_to_remove and not (self.record_past and self.is_croppable):
            raise SixfoldError(
                "this layer has a state beside its attention, which goes back only if it is a "
                "convolution's and cache.activate_past_recording() was called before."
            )
        super().check_crop(tokens_to_remove)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens.

        Raises:
            SixfoldError: Past states were not recorded, or a recurrent state cannot go back.
        """
        self.check_crop(tokens_to_remove)
        if self.record_past:
            for index, state in self.conv_states.items():
                size = self.conv_kernel_size[index]
                if state is not None and size is not None:
                    kept = state.shape[-1] + tokens_to_remove
                    self.conv_states[index] = state[..., max(kept - size, 0) : kept]
        TurboQuantLayer.crop(self, tokens_to_remove)

    def reset(self) -> None:
        """Forget every token and state."""
        LinearAttentionLayer.reset(self)
        TurboQuantLayer.reset(self)

    def activate_past_recording(self) -> None:
        """Keep what leaves a window or a convolution until the next `crop`."""
        LinearAttentionLayer.activate_past_recording(self)
        TurboQuantLayer.activate_past_recording(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        replace_states(self, lambda state: state.index_select(0, beam_idx.to(state.device)))
        TurboQuantLayer.reorder_cache(self, beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences of the batch."""
        replace_states(self, lambda state: state[indices.to(state.device)])
        TurboQuantLayer.batch_select_indices(self, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        replace_states(self, lambda state: state.repeat_interleave(repeats, 0))
        TurboQuantLayer.batch_repeat_interleave(self, repeats)

    def offload(self) -> None:
        """Move everything held to the CPU."""
        replace_states(self, lambda state: state.to("cpu"))
        TurboQuantLayer.offload(self)

    def prefetch(self) -> None:
        """Move everything held back to the device of the model."""
        replace_states(self, lambda state: state.to(self.device))
        TurboQuantLayer.prefetch(self)

    def move(self, device: torch.device | None, dtype: torch.dtype | None = None) -> None:
        """Move everything held, for good; states keep their dtype."""
        replace_states(self, lambda state: state.to(device or state.device))
        TurboQuantLayer.move(self, device, dtype)

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        return [*TurboQuantLayer.tensors(self), *self.extra_tensors().values()]

    def extra_tensors(self) -> dict[str, Tensor]:
        """The states, by the names that `save` gives them."""
        return held_beside(self)

    def adopt_extra(self, tensors: dict[str, Tensor]) -> None:
        """Hold what `extra_tensors` gave."""
        for name, tensor in tensors.items():
            kind, _, index = name.partition(".")
            if kind not in STATES or index not in map(str, range(self.number_of_states)):
                raise FormatError(f"this model has no {name!r} beside its keys and values.")
            self.lazy_initialization(**{kind: tensor}, state_idx=int(index))
            getattr(self, kind)[int(index)].copy_(tensor)
            self.has_previous_state[int(index)] = True

    def fork(self) -> Self:
        """A layer that continues from the same tokens; states change in place and are copied."""
        twin = TurboQuantLayer.fork(self)
        for name, attribute in vars(self).items():
            if isinstance(attribute, dict):
                setattr(twin, name, dict(attribute))
        replace_states(twin, Tensor.clone)
        return twin


class IndexedTurboQuantLayer(TurboQuantLayer):
    """Attention whose tokens an indexer selects (DeepSeek-V3.2): its keys stay as they are.

    Attributes:
        indexer_keys: [batch, tokens, dim].
        indexer_position_ids: [axes, batch, tokens], where the model keeps them.
    """

    indexer_keys: Tensor | None = None
    indexer_position_ids: Tensor | None = None

    @property
    def tokens_seen(self) -> int:
        """Tokens of which there are keys and values."""
        return super().get_seq_length()

    @property
    def tokens_indexed(self) -> int:
        """Tokens of which there are an indexer's keys; without an indexer those that were seen."""
        return self.tokens_seen if self.indexer_keys is None else self.indexer_keys.shape[1]

    def get_seq_length(self) -> int:
        """Tokens seen a sequence, in both parts."""
        return min(self.tokens_seen, self.tokens_indexed)

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """Add keys of the indexer, [batch, tokens, dim]; returns all of them."""
        held = self.indexer_keys
        keys = indexer_key_states if held is None else torch.cat([held, indexer_key_states], 1)
        self.indexer_keys = keys
        return keys

    def reset(self) -> None:
        """Forget every token."""
        super().reset()
        self.indexer_keys = self.indexer_position_ids = None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens, of which each part may lack some."""
        self.check_crop(tokens_to_remove)
        left = max(self.tokens_seen, self.tokens_indexed) + tokens_to_remove
        self._replace_extra(
            lambda x, batch: x.narrow(batch + 1, 0, min(max(left, 0), x.shape[batch + 1]))
        )
        super().crop(min(left - self.tokens_seen, 0))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        super().reorder_cache(beam_idx)
        self._replace_extra(lambda x, batch: x.index_select(batch, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences of the batch."""
        super().batch_select_indices(indices)
        rows = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        self._replace_extra(lambda x, batch: x.index_select(batch, rows.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        super().batch_repeat_interleave(repeats)
        self._replace_extra(lambda x, batch: x.repeat_interleave(repeats, batch))

    def offload(self) -> None:
        """Move everything held to the CPU."""
        super().offload()
        self._replace_extra(lambda x, _: x.to("cpu"))

    def prefetch(self) -> None:
        """Move everything held back to the device of the model."""
        super().prefetch()
        self._replace_extra(lambda x, _: x.to(self.device))

    def move(self, device: torch.device | None, dtype: torch.dtype | None = None) -> None:
        """Move everything held, for good; what belongs to the indexer keeps its dtype."""
        super().move(device, dtype)
        self._replace_extra(lambda x, _: x.to(device or x.device))

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        return [*super().tensors(), *self.extra_tensors().values()]

    def extra_tensors(self) -> dict[str, Tensor]:
        """What is held beside keys and values, by the names that `save` gives it."""
        return held_beside(self)

    def adopt_extra(self, tensors: dict[str, Tensor]) -> None:
        """Hold what `extra_tensors` gave."""
        for name, tensor in tensors.items():
            if name not in INDEXER:
                raise FormatError(f"this model has no {name!r} beside its keys and values.")
            setattr(self, name, tensor)

    def _replace_extra(self, change: Callable[[Tensor, int], Tensor]) -> None:
        """Change each tensor, given the number of its batch axis."""
        self.adopt_extra({n: change(x, INDEXER[n]) for n, x in self.extra_tensors().items()})
