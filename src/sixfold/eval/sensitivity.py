"""What each layer's keys and values cost by themselves: the rest of the cache stays exact."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from sixfold.eval.caches import MakeCache, compressed
from sixfold.eval.checkpoint import Checkpoint
from sixfold.eval.estimate import Estimate
from sixfold.eval.perplexity import compare_caches
from sixfold.eval.progress import Progress, no_progress
from sixfold.integrations.transformers.config import COMPRESSED_TYPES, layer_types
from sixfold.packing import Bits

Side: TypeAlias = Literal["keys", "values"]
SIDES: tuple[Side, ...] = ("keys", "values")

FINEST: Bits = 8
"""Bits of the side that is not measured: codes have no wider width."""


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """The cost of one side of one layer.

    Attributes:
        layer: Its index; the others are uncompressed.
        side: What has `bits`; the other side of the layer has 8.
        bits: Bits a coordinate.
        kl: Mean KL to the uncompressed model, in nats.
    """

    layer: int
    side: Side
    bits: Bits
    kl: Estimate

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)


def measure_sensitivity(
    model: PreTrainedModel,
    windows: Int[Tensor, "windows tokens"],
    widths: Sequence[Bits],
    *,
    prefill: int,
    chunk: int = 64,
    options: Mapping[str, Any] | None = None,
    progress: Progress = no_progress,
    checkpoint: Checkpoint | None = None,
) -> list[Sensitivity]:
    """Compress one side of one layer at a time, at every width.

    Args:
        model: A causal language model.
        windows: Token ids; every window is a text of its own.
        widths: Bits a coordinate of the side under test.
        prefill: First tokens of a window, which are not scored.
        chunk: Tokens a forward pass after that.
        options: Of `TurboQuantCache`, for all; by default no tokens stay in full precision.
        progress: See `compare_caches`.
        checkpoint: Likewise.

    Returns:
        One for every layer that can be compressed, side and width, in that order.
    """
    types, _ = layer_types(model.config)
    cases = [
        (layer, side, bits)
        for layer, kind in enumerate(types)
        if kind in COMPRESSED_TYPES
        for side in SIDES
        for bits in widths
    ]
    fixed = {"sink_tokens": 0, "recent_window": 0} if options is None else dict(options)
    caches = {_name(*case): _only(*case, len(types), fixed) for case in cases}
    found = compare_caches(
        model,
        windows,
        caches,
        prefill=prefill,
        chunk=chunk,
        progress=progress,
        checkpoint=checkpoint,
    )
    return [Sensitivity(*case, found[_name(*case)].kl) for case in cases]


def _name(layer: int, side: Side, bits: Bits) -> str:
    return f"{side} of layer {layer} at {bits:g} bits"


def _only(layer: int, side: Side, bits: Bits, layers: int, fixed: dict[str, Any]) -> MakeCache:
    key_bits, value_bits = (bits, FINEST) if side == "keys" else (FINEST, bits)
    others = [index for index in range(layers) if index != layer]
    return compressed(FINEST, key_bits=key_bits, value_bits=value_bits, skip_layers=others, **fixed)
