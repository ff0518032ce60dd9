"""What to keep, and at how many bits."""

import dataclasses
from typing import Any, Self

from sixfold.errors import SixfoldError
from sixfold.packing import Bits, check_bits

# What these widths are best spent on, keys and values; the others evenly (docs/recipe.md).
SPLITS: dict[Bits, tuple[Bits, Bits]] = {3.5: (4, 3), 3: (3.5, 2.5)}


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

    @classmethod
    def spending(cls, bits: Bits, *, longer_keys: bool = False, **fields: Any) -> Self:
        """A policy that spends `bits` bits a coordinate where they matter most.

        Args:
            bits: Bits a coordinate, keys and values together.
            longer_keys: Whether a key has more coordinates than a value, so that bits moved to it
                would make the cache larger: none are.
            fields: Of the policy. With `key_bits` or `value_bits` among them, those have the bits
                named and the others have `bits`.
        """
        given = {name: fields.pop(name, None) for name in ("key_bits", "value_bits")}
        chosen = {name: width for name, width in given.items() if width is not None}
        even = longer_keys or bool(chosen)
        key_bits, value_bits = (bits, bits) if even else SPLITS.get(bits, (bits, bits))
        return cls(**{"key_bits": key_bits, "value_bits": value_bits, **chosen, **fields})

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return dataclasses.asdict(self)
