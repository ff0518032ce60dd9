"""What to keep, and at how many bits."""

import dataclasses
from typing import Any

from sixfold.errors import SixfoldError
from sixfold.packing import Bits, check_bits


@dataclasses.dataclass(frozen=True)
class CachePolicy:
    """How one attention layer is compressed.

    Attributes:
        key_bits: Bits a key coordinate: 1 to 8, 2.5 or 3.5.
        value_bits: Bits a value coordinate.
        sink_tokens: First tokens of every sequence kept in the model's dtype (attention sinks).
        recent_window: Last tokens kept in the model's dtype; up to one page (64 tokens) more are,
            until a page is full.
        center_keys: Subtract the mean key of every head; exact (docs/key_map.md).
        equalize_keys: Scale key channels to the spread of the queries they meet; exact likewise.
        seed: Seed of the rotation.
    """

    key_bits: Bits = 4
    value_bits: Bits = 4
    sink_tokens: int = 4
    recent_window: int = 64
    center_keys: bool = True
    equalize_keys: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_bits(self.key_bits)
        check_bits(self.value_bits)
        for name in ("sink_tokens", "recent_window", "seed"):
            number = getattr(self, name)
            if not isinstance(number, int) or number < 0:
                raise SixfoldError(f"{name} must be a whole number of 0 or more, got {number!r}.")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return dataclasses.asdict(self)
