"""A transformers cache that quantizes tokens as they enter, the way a peer does.

What attention sees of earlier forward passes is what the peer would read back from its codes;
tokens of the pass under way are seen exactly, by every cache alike. The tensors held here are
dense: `nbytes` counts what the original would hold for the same tokens.
"""

import copy
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, DynamicLayer

from sixfold.errors import SixfoldError
from sixfold.eval.peers.scheme import Scheme
from sixfold.integrations.transformers.config import layer_types


@dataclass
class _Side:
    """The keys or the values of a layer: how many tokens are codes, and what was fixed at first."""

    scheme: Scheme
    coded: int = 0
    calibration: Tensor | None = None

    def absorb(self, x: Tensor) -> Tensor:
        """Replace the tokens that have become due by what is read back of their codes."""
        if self.coded == 0 and self.calibration is None:
            self.calibration = self.scheme.calibrate(x)
        due, total = self.scheme.due(self.coded, x.shape[-2]), x.shape[-2]
        if due == self.coded:
            return x
        start = 0 if self.scheme.requantizes else self.coded
        before, fresh, after = x.split([start, due - start, total - due], dim=-2)
        self.coded = due
        read = self.scheme.roundtrip(fresh.contiguous(), self.calibration).to(x.dtype)
        return torch.cat([before, read, after], dim=-2)

    def nbytes(self, x: Tensor) -> int:
        """Bytes of the codes, and of the tokens that are none yet."""
        batch, heads, total, dim = x.shape
        window = batch * heads * (total - self.coded) * dim * x.element_size()
        return window + self.scheme.nbytes(batch, heads, self.coded, dim, x.element_size())


class PeerLayer(DynamicLayer):
    """An attention layer whose history is what a peer reads back of it.

    It grows and nothing else: beams and cropping are not simulated.
    """

    is_croppable = False

    def __init__(self, keys: Scheme, values: Scheme) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sides = _Side(keys), _Side(values)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens; returns the history as read back, then the new tokens as they are."""
        seen = super().update(key_states, value_states, *args, **kwargs)
        # Dense tensors in transformers' own attributes: lengths and masks are then theirs.
        self.keys, self.values = (side.absorb(x) for side, x in zip(self._sides, seen, strict=True))
        return seen

    @property
    def schemes(self) -> tuple[Scheme, Scheme]:
        """How keys and values are stored."""
        keys, values = self._sides
        return keys.scheme, values.scheme

    @property
    def nbytes(self) -> int:
        """Bytes the original holds of the same tokens."""
        if self.keys is None or self.values is None:
            return 0
        keys, values = self._sides
        return keys.nbytes(self.keys) + values.nbytes(self.values)

    def crop(self, tokens_to_remove: int) -> None:
        """Not simulated.

        Raises:
            SixfoldError: Always.
        """
        raise SixfoldError("a simulated peer only grows: it cannot be cropped")

    def fork(self) -> Self:
        """A layer that continues from the same tokens: tensors are replaced, never changed."""
        twin = copy.copy(self)
        keys, values = self._sides
        twin._sides = copy.copy(keys), copy.copy(values)
        return twin


class PeerCache(Cache):
    """The cache of a peer. Layers that are not full attention stay as transformers makes them."""

    def __init__(self, config: PreTrainedConfig, keys: Scheme, values: Scheme) -> None:
        types, kwargs = layer_types(config)
        super().__init__(
            layers=[
                PeerLayer(keys, values)
                if kind == "full_attention"
                else DYNAMIC_LAYER_TYPE_MAPPING[kind](**options)
                for kind, options in zip(types, kwargs, strict=True)
            ]
        )

    @property
    def nbytes(self) -> int:
        """Bytes the original holds for the same tokens: codes, scales, windows."""
        return sum(_layer_bytes(layer) for layer in self.layers)

    def fork(self) -> Self:
        """A cache that continues from the same tokens."""
        twin = copy.copy(self)
        twin.layers = [
            layer.fork() if isinstance(layer, PeerLayer) else copy.deepcopy(layer)
            for layer in self.layers
        ]
        return twin


def _layer_bytes(layer: Any) -> int:
    if isinstance(layer, PeerLayer):
        return layer.nbytes
    held = (getattr(layer, name, None) for name in ("keys", "values"))
    return sum(x.nbytes for x in held if isinstance(x, Tensor))
