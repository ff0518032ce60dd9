"""The paper's outlier-channel split, kept to reproduce its 2.5- and 3.5-bit results."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from sixfold._surroundings import outside_autocast, untraced
from sixfold.arguments import MOST_COORDINATES, dense, settle, whole
from sixfold.codes import SplitCodes, checked
from sixfold.errors import ShapeError, SixfoldError
from sixfold.kernels._tiles import tiles
from sixfold.kernels._wide import wide
from sixfold.kernels.encode import Scale
from sixfold.packing import Bits
from sixfold.quantizers._checks import check_queries, check_vectors
from sixfold.quantizers.mse import TurboQuantMSE
from sixfold.rotation import RotationKind


@dataclass(frozen=True)
class OutlierSplit:
    """Two independent `TurboQuantMSE`, one for the largest channels and one for the others.

    Each has the codebook of its own dimension. 32 channels at 3 bits and 96 at 2, with two
    16-bit scales, are 2.5 bits per coordinate. At the same size `TurboQuantMSE(128, 2.5)` loses
    40 % less on vectors without outliers.

    Attributes:
        dim: Coordinates per vector, at least 2.
        outlier_channels: Channels of the first kind, 1 to `dim` - 1.
        outlier_bits: Their bits per coordinate.
        bits: Bits per coordinate of the others.
        scale: See `TurboQuantMSE`; the paper's is `"norm"`.
        rotation: See `TurboQuantMSE`.
        seed: Of the rotations.

    Raises:
        SixfoldError: A field has none of the values above.

    Source: arXiv:2504.19874 §4.3.
    """

    dim: int
    outlier_channels: int = 32
    outlier_bits: Bits = 3
    bits: Bits = 2
    scale: Scale = "norm"
    rotation: RotationKind = "hadamard"
    seed: int = 0

    def __post_init__(self) -> None:
        dim = whole("dim", self.dim, 2, MOST_COORDINATES)
        channels = whole("outlier_channels", self.outlier_channels, 1, dim - 1)
        settle(self, dim=dim, outlier_channels=channels)
        # Made for their checks of the other fields.
        outliers, rest = self._outliers, self._rest
        settle(self, outlier_bits=outliers.bits, bits=rest.bits, seed=rest.seed)

    def _part(self, dim: int, bits: Bits) -> TurboQuantMSE:
        return TurboQuantMSE(dim, bits, self.scale, self.rotation, self.seed)

    @property
    def _outliers(self) -> TurboQuantMSE:
        return self._part(self.outlier_channels, self.outlier_bits)

    @property
    def _rest(self) -> TurboQuantMSE:
        return self._part(self.dim - self.outlier_channels, self.bits)

    @outside_autocast
    def choose_channels(
        self, x: Float[Tensor, "*batch n dim"]
    ) -> Int[Tensor, "*batch {self.outlier_channels}"]:
        """The channels of largest L2 norm over the n tokens, ascending.

        Raises:
            ShapeError: The last axis of `x` is not `dim`, or there is no token axis.
            SixfoldError: `x` is not of a floating dtype.
        """
        self._check_tokens(x)
        norms = torch.linalg.vector_norm(x, dim=-2, dtype=wide(x.device))
        return torch.topk(norms, self.outlier_channels, dim=-1).indices.sort(dim=-1).values

    @untraced
    @outside_autocast
    def encode(
        self,
        x: Float[Tensor, "*batch n dim"],
        channels: Int[Tensor, "*batch {self.outlier_channels}"] | None = None,
    ) -> SplitCodes:
        """Compress the tokens of each sequence with the same outlier channels.

        Args:
            x: Vectors, any floating dtype, with at least a token axis.
            channels: Distinct and ascending; default `choose_channels(x)`. Pass those of the
                first chunk, to keep them for a sequence that grows.

        Raises:
            ShapeError: The last axis of `x` is not `dim`, or there is no token axis; or there are
                not `outlier_channels` channels for every sequence, ascending and below `dim`.
            SixfoldError: `x` is not of a floating dtype, or `channels` are no whole numbers.
        """
        self._check_tokens(x)
        if channels is None:
            channels = self.choose_channels(x)
        else:
            self._check_channels(channels, x)
        shared = channels.int()[..., None, :].expand(*x.shape[:-1], -1)
        sizes = [self._rest.dim, self._outliers.dim]
        rest, outliers = torch.split(x.gather(-1, self._order(shared)), sizes, dim=-1)
        return SplitCodes(self, self._outliers.encode(outliers), self._rest.encode(rest), shared)

    def _check_tokens(self, x: Tensor) -> None:
        check_vectors(x, self.dim)
        if x.ndim < 2:
            raise ShapeError(f"x must have a token axis, [*batch, n, dim], got {tuple(x.shape)}")

    def _check_channels(self, channels: Any, x: Tensor) -> None:
        dense("channels", channels)
        if channels.dtype not in (torch.int32, torch.int64) or channels.device != x.device:
            raise SixfoldError(
                f"channels must be int32 or int64 on {x.device}, got {channels.dtype} on "
                f"{channels.device}: pass what choose_channels gives."
            )
        shape = (*x.shape[:-2], self.outlier_channels)
        numbers = channels if channels.shape == shape and not channels.is_meta else None
        # On an accelerator the comparison would wait for it: there the device asserts.
        if numbers is None or (numbers.is_cpu and not _ascending(numbers, self.dim)):
            raise ShapeError(
                f"channels must be {list(shape)} numbers from 0 to {self.dim - 1}, distinct and "
                f"ascending, got {list(channels.shape)}: pass what choose_channels gives."
            )

    def _order(self, channels: Tensor) -> Tensor:
        """All channels [*batch, dim], the outliers last, both groups ascending."""
        shape = *channels.shape[:-1], self.dim
        outlier = torch.zeros(shape, dtype=torch.uint8, device=channels.device)
        return outlier.scatter(-1, channels.long(), 1).argsort(dim=-1, stable=True)

    @untraced
    @outside_autocast
    def decode(self, codes: SplitCodes) -> Float32[Tensor, "*batch dim"]:
        """Reconstruct vectors, in the units of those encoded.

        Raises:
            SixfoldError: Another quantizer made the codes.
        """
        codes = checked(codes, SplitCodes, self)
        parts = self._rest.decode(codes.rest), self._outliers.decode(codes.outliers)
        ordered = torch.cat(parts, dim=-1)
        return torch.empty_like(ordered).scatter(-1, self._order(codes.channels), ordered)

    @untraced
    @outside_autocast
    def scores(
        self, queries: Float[Tensor, "*batch n_queries dim"], codes: SplitCodes
    ) -> Float32[Tensor, "*batch n_queries n"]:
        """Estimate ⟨query, x⟩ from the codes, decoding tile by tile.

        Raises:
            ShapeError: Queries and codes do not share their batch axes.
            SixfoldError: Another quantizer made the codes, or devices differ.
        """
        codes = checked(codes, SplitCodes, self)
        check_queries(queries, codes)
        width = self.dim * codes.shape[:-2].numel()
        parts = [self.decode(codes[..., tile]) for tile in tiles(codes.shape[-2], width)]
        return torch.cat([queries.float() @ part.mT for part in parts], dim=-1)


def _ascending(channels: Tensor, dim: int) -> bool:
    apart = (channels.diff(dim=-1) > 0).all()
    return bool(apart & (channels >= 0).all() & (channels < dim).all())
