"""How a peer stores one side of a cache: what it makes of vectors, and the bytes that takes."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from sixfold.errors import SixfoldError

FLOAT16 = 2
"""Bytes of a scale or norm where the original always stores 16 bits."""


@dataclass(frozen=True)
class Scheme(ABC):
    """One side, keys or values, of somebody else's quantized cache.

    A scheme is arithmetic alone: it turns vectors into what the original would read back, and
    says what the original would have stored. Tokens are those of all batch rows and heads.
    """

    requantizes: ClassVar[bool] = False
    """Whether tokens that were coded before are coded again with those that become due."""

    def due(self, coded: int, total: int) -> int:
        """How many of the first tokens are codes once there are `total`, of which `coded` were."""
        return total

    def calibrate(self, first: Float[Tensor, "batch heads tokens dim"]) -> Tensor | None:
        """What is fixed when the first chunk arrives, if anything is."""
        return None

    @abstractmethod
    def roundtrip(
        self, x: Float[Tensor, "batch heads tokens dim"], calibration: Tensor | None
    ) -> Float[Tensor, "batch heads tokens dim"]:
        """What the original reads back of the tokens that have just become due.

        Raises:
            SixfoldError: The original cannot store vectors of this size.
        """

    @abstractmethod
    def nbytes(self, batch: int, heads: int, tokens: int, dim: int, element_size: int) -> int:
        """Bytes the original stores of `tokens` coded tokens a sequence.

        Args:
            batch: Sequences.
            heads: KV heads.
            tokens: Coded tokens of each.
            dim: Coordinates a vector.
            element_size: Bytes a number of the model's dtype, in which some keep their scales.
        """


def per_vector(bits: float, dim: int, scales: int, scale_bytes: int = FLOAT16) -> int:
    """Bytes of one vector of `dim` codes of `bits` bits, and its scales."""
    return -(-round(bits * dim) // 8) + scales * scale_bytes


def require_multiple(dim: int, block: int, peer: str) -> None:
    """Refuse a head dimension that the original refuses as well.

    Raises:
        SixfoldError: `dim` is not a multiple of `block`.
    """
    if dim % block:
        raise SixfoldError(
            f"{peer} stores blocks of {block} coordinates: expected a head dimension that is a "
            f"multiple of {block}, got {dim}; leave {peer} out for this model"
        )
