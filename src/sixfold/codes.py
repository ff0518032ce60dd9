"""Compressed vectors: frozen groups of tensors that share their leading batch axes."""

import dataclasses
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float16, Int32, UInt8
from torch import Tensor

from sixfold.arguments import device as checked_device
from sixfold.arguments import shown
from sixfold.errors import OutOfRangeError, SixfoldError

# Not `Self`: run-time checkers of single methods cannot resolve that.
C = TypeVar("C", bound="Codes")


@runtime_checkable
class Spec(Hashable, Protocol):
    """What made the codes: a frozen quantizer of vectors of `dim` coordinates."""

    @property
    def dim(self) -> int: ...


@dataclass(frozen=True, eq=False)
class Codes:
    """Codes of a batch of vectors, indexed and moved like a tensor of that batch.

    Attributes:
        spec: The quantizer that made the codes, and the only one that reads them.
    """

    spec: Spec

    def _parts(self) -> dict[str, "Tensor | Codes"]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: v for name, v in values.items() if isinstance(v, Tensor | Codes)}

    def _map(self: C, function: Callable[[Tensor], Tensor]) -> C:
        parts = self._parts().items()
        mapped: dict[str, Any] = {
            k: v._map(function) if isinstance(v, Codes) else function(v) for k, v in parts
        }
        return dataclasses.replace(self, **mapped)

    @property
    def shape(self) -> torch.Size:
        """Shape of the vectors: the batch axes, then `dim`."""
        # The first part of every kind has one axis behind the batch: bytes, or coordinates.
        first = next(iter(self._parts().values()))
        return torch.Size((*first.shape[:-1], self.spec.dim))

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return next(iter(self._parts().values())).device

    @property
    def nbytes(self) -> int:
        """Bytes of everything stored per vector: codes, scales, norms, radii, channel lists."""
        return sum(
            part.nbytes if isinstance(part, Codes) else _stored_bytes(part)
            for part in self._parts().values()
        )

    @property
    def bits_per_value(self) -> float:
        """Stored bits per coordinate, scales and padding included; 0 of no vectors."""
        return 8 * self.nbytes / max(self.shape.numel(), 1)

    def to(self: C, device: torch.device | str) -> C:
        """The same codes on another device.

        Raises:
            SixfoldError: There is no such device.
        """
        target = checked_device(device)
        return self._map(lambda part: part.to(target))

    def __len__(self) -> int:
        if len(self.shape) == 1:
            raise TypeError("len() of the codes of a single vector")
        return self.shape[0]

    def __getitem__(self: C, index: Any) -> C:
        """Index the batch axes, as a tensor of shape `shape[:-1]` would be.

        Raises:
            OutOfRangeError: Such a tensor has no such index.
        """
        index = index if isinstance(index, tuple) else (index,)
        n_batch = len(self.shape) - 1
        if not any(entry is Ellipsis for entry in index):
            index = (*index, Ellipsis)
        try:
            return self._map(lambda part: part[(*index, *[slice(None)] * (part.ndim - n_batch))])
        except (IndexError, TypeError, ValueError, RuntimeError) as error:
            raise OutOfRangeError(
                f"codes of shape {list(self.shape)} are indexed like a tensor of shape "
                f"{list(self.shape[:-1])}, got {shown(index[:-1])}: {error}"
            ) from error


def _stored_bytes(tensor: Tensor) -> int:
    # An axis of stride 0 repeats one stored value: the channels shared by all tokens.
    axes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in axes if stride) * tensor.element_size()


@dataclass(frozen=True, eq=False)
class MSECodes(Codes):
    """Packed codebook indices and one scale per vector, in its units / sqrt(dim)."""

    packed: UInt8[Tensor, "*b row_bytes"]
    scales: Float16[Tensor, "*b"]


@dataclass(frozen=True, eq=False)
class TrellisCodes(Codes):
    """Packed paths through a trellis and one scale per vector, in its units / sqrt(dim)."""

    packed: UInt8[Tensor, "*b path_bytes"]
    scales: Float16[Tensor, "*b"]


@dataclass(frozen=True, eq=False)
class QJLCodes(Codes):
    """Packed signs of the projections and the norm of each vector, in its units."""

    packed: UInt8[Tensor, "*b row_bytes"]
    norms: Float16[Tensor, "*b"]


@dataclass(frozen=True, eq=False)
class ProdCodes(Codes):
    """Signs of the projected residual, and the codes it is the residual of (none at 1 bit)."""

    residual: QJLCodes
    mse: MSECodes | None


@dataclass(frozen=True, eq=False)
class PolarCodes(Codes):
    """Packed angles, level by level, and one radius per block, in the units of the vectors."""

    packed: UInt8[Tensor, "*b row_bytes"]
    radii: Float16[Tensor, "*b blocks"]


@dataclass(frozen=True, eq=False)
class SplitCodes(Codes):
    """Outlier channels and the rest, coded apart; `channels` lists the outliers, ascending."""

    outliers: MSECodes
    rest: MSECodes
    channels: Int32[Tensor, "*b outlier_channels"]


def checked(codes: Any, kind: type[C], spec: Spec) -> C:
    """The codes, if `spec` made them.

    Raises:
        SixfoldError: Another quantizer made them, or they are not codes.
    """
    if not isinstance(codes, kind):
        raise SixfoldError(f"{spec} reads {kind.__name__}, got {type(codes).__name__}")
    if codes.spec != spec:
        raise SixfoldError(f"these codes were made by {codes.spec}; they cannot be read by {spec}")
    return codes
