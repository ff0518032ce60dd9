"""What to keep, and at how many bits."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Self, get_args

from sixfold.arguments import MOST_COORDINATES, choice, flag, sequence, settle, shown, whole
from sixfold.errors import SixfoldError
from sixfold.kernels.types import CodeName, row_symbols
from sixfold.packing import Bits, check_bits, row_bytes
from sixfold.trellis import pages_hold

# What these widths are best spent on, keys and values; the others evenly (docs/recipe.md).
SPLITS: dict[CodeName, dict[Bits, tuple[Bits, Bits]]] = {
    "codebook": {3.5: (4, 3), 3: (3.5, 2.5), 2.5: (3, 2)},
    "trellis": {3.5: (4, 3), 2.5: (3, 2)},
}

# Tokens that caches which grow fit their key maps to, unless told otherwise (docs/key_map.md).
FIT_TOKENS = 512


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
        fit_tokens: Tokens that a key map is fitted to, at least: until the longest sequence of a
            batch has as many, all stay in the model's dtype. Where nothing is fitted, and in an
            engine's layers, which fit a map again, none are asked for.
        seed: Seed of the rotation.
        code: `"trellis"` chooses the codes of all coordinates of a vector together, which loses
            about half as much in the same bits and takes longer to encode. It has 1, 2, 2.5, 3 and
            4 bits; other widths, and vectors of fewer than 32 coordinates or of bits that fill no
            whole bytes, have a codebook in either case. `"codebook"`: so has everything.
    """

    key_bits: Bits = 4
    value_bits: Bits = 4
    sink_tokens: int = 4
    recent_window: int = 64
    center_keys: bool = True
    equalize_keys: bool = True
    fit_tokens: int = 0
    seed: int = 0
    code: CodeName = "trellis"

    def __post_init__(self) -> None:
        choice("code", self.code, get_args(CodeName))
        numbers = ("sink_tokens", "recent_window", "fit_tokens", "seed")
        settle(
            self,
            key_bits=check_bits(self.key_bits, "key_bits"),
            value_bits=check_bits(self.value_bits, "value_bits"),
            **{name: whole(name, getattr(self, name)) for name in numbers},
        )
        for name in ("center_keys", "equalize_keys"):
            flag(name, getattr(self, name))

    @classmethod
    def spending(cls, bits: Bits, dims: Iterable[tuple[int, int]] = (), **fields: Any) -> Self:
        """A policy that spends `bits` bits a coordinate where they matter most.

        Args:
            bits: Bits a coordinate, keys and values together.
            dims: Dimensions of keys and values in the layers meant. Where moving bits from values
                to keys would make the cache larger, keys having more coordinates than values or
                codes filling whole bytes less well, none are moved.
            fields: Of the policy. With `key_bits` or `value_bits` among them, those have the bits
                named and the others have `bits`.
        """
        bits = check_bits(bits)
        given = {name: fields.pop(name, None) for name in ("key_bits", "value_bits")}
        chosen = {name: width for name, width in given.items() if width is not None}
        code = choice("code", fields.get("code", cls.code), get_args(CodeName))
        pairs = [_dims(pair) for pair in sequence("dims", dims)]
        even, split = (bits, bits), _split(bits, pairs, code)
        larger = any(
            _pair_bytes(split, pair, code) > _pair_bytes(even, pair, code) for pair in pairs
        )
        key_bits, value_bits = even if chosen or larger else split
        return cls(**{"key_bits": key_bits, "value_bits": value_bits, **chosen, **fields})

    @property
    def least_tokens(self) -> int:
        """Tokens that a key map is fitted to, at least; 0 where there is nothing to fit."""
        return self.fit_tokens if self.center_keys or self.equalize_keys else 0

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return dataclasses.asdict(self)


def _dims(pair: Any) -> tuple[int, int]:
    dims = sequence("dims", pair)
    if len(dims) != 2:
        raise SixfoldError(f"dims must be pairs such as (128, 128), got {shown(pair)}")
    key_dim, value_dim = (whole("dims", dim, 1, MOST_COORDINATES) for dim in dims)
    return key_dim, value_dim


def _split(bits: Bits, pairs: Sequence[tuple[int, int]], code: CodeName) -> tuple[Bits, Bits]:
    """Where bits matter most to the code that vectors of these dimensions have."""
    widths = SPLITS[code].get(bits, (bits, bits))
    held = all(
        code_of(code, dim, width) == code
        for pair in pairs
        for dim, width in zip(pair, widths, strict=True)
    )
    return widths if held else SPLITS["codebook"].get(bits, (bits, bits))


def _pair_bytes(widths: tuple[Bits, Bits], dims: tuple[int, int], code: CodeName) -> int:
    """Bytes of the codes of a key and a value."""
    return sum(
        row_bytes(*row_symbols(dim, bits, code_of(code, dim, bits)))
        for dim, bits in zip(dims, widths, strict=True)
    )


def code_of(code: CodeName, dim: int, bits: Bits) -> CodeName:
    """How vectors of `dim` coordinates are coded where a policy says `code`."""
    return "trellis" if code == "trellis" and pages_hold(dim, bits) else "codebook"
