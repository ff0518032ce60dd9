"""The header of a safetensors file: which tensor lies where, checked before any is read."""

import dataclasses
import json
import math
import struct
from io import BufferedReader
from typing import Any

import torch

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.uint8: "U8",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}

# What the format itself allows.
_MAX_HEADER_BYTES = 100_000_000
_PREFIX = struct.Struct("<Q")
_METADATA = "__metadata__"


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Shape and safetensors dtype name of a stored tensor."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of such a tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file says about itself.

    Attributes:
        entries: What it says of every tensor, unchecked.
        metadata: Its strings.
        body: Bytes before the first tensor.
        size: Bytes of the file.
    """

    entries: dict[str, Any]
    metadata: dict[str, str]
    body: int
    size: int

    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor, in the order in which they lie behind one another, without a gap.

        Raises:
            ValueError: A tensor's place or shape is none, or the file does not end with the last.
        """
        places = {name: _place(name, entry) for name, entry in self.entries.items()}
        found, end = {}, 0
        for name, (start, stop, spec) in sorted(places.items(), key=lambda item: item[1][:2]):
            if start != end or stop - start != spec.nbytes:
                expected = f"expected {spec} from byte {end}"
                raise ValueError(f"{name} lies at bytes {start} to {stop}, {expected}")
            found[name], end = spec, stop
        if self.body + end != self.size:
            raise ValueError(f"expected {self.body + end} bytes, the file has {self.size}")
        return found


def read_header(file: BufferedReader, size: int) -> Header:
    """Read and parse the header of a file of `size` bytes that stands at its beginning.

    Raises:
        ValueError: There is none.
    """
    prefix = file.read(_PREFIX.size)
    if len(prefix) < _PREFIX.size:
        raise ValueError(f"it has {size} bytes")
    (length,) = _PREFIX.unpack(prefix)
    if length > min(_MAX_HEADER_BYTES, size - _PREFIX.size):
        raise ValueError(f"its header would have {length} bytes")
    try:
        entries = json.loads(file.read(length), object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("its header is nested too deeply") from None
    metadata = entries.pop(_METADATA, {}) if isinstance(entries, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
        raise ValueError("its header is no JSON object, or its metadata are no strings")
    return Header(entries, metadata, _PREFIX.size + length, size)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice in its header")
    return found


def _place(name: str, entry: Any) -> tuple[int, int, TensorSpec]:
    """First byte, byte after the last, and spec of a tensor."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} has no dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not _whole(shape) or not _whole(offsets) or len(offsets) != 2:
        raise ValueError(f"{name} has shape {shape} and offsets {offsets}")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {dtype!r}, expected one of {sorted(DTYPES)}")
    # Of empty tensors too: torch computes strides from all sizes.
    if math.prod(max(n, 1) for n in shape) * DTYPES[dtype].itemsize >= 2**63:
        raise ValueError(f"{name} has shape {shape}")
    return offsets[0], offsets[1], TensorSpec(tuple(shape), dtype)


def _whole(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)
