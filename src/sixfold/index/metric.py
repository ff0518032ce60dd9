"""What a score is: inner products of what is coded, and what is added to them.

A vector x is coded as r = x - μ, with the mean μ of its segment. What is left over is exact: with
any number t, ⟨q, x⟩ = ⟨q - tμ, r⟩ + t⟨μ, r⟩ + ⟨q, μ⟩. The error of codes grows with the length of
what they are multiplied with; t = ⟨q, μ⟩/‖μ‖² makes it the shortest.
"""

from typing import Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

Metric: TypeAlias = Literal["cosine", "ip", "l2"]

TINY, HUGE = 1e-15, 1e15
# The least number of float32 that has all its digits.
LEAST = 2.0**-126
# Of ‖μ‖², from which on t is not 0.
LEAST_SQUARE = {"cosine": 1e-6, "ip": LEAST}


def prepared(x: Float[Tensor, "n dim"], metric: Metric) -> Float[Tensor, "n dim"]:
    """Vectors, or queries, of which scores are to be made: of length 1 where length is nothing."""
    if metric != "cosine" or not len(x):
        return x
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    least, most = length.aminmax()
    if least < TINY or most > HUGE:
        # Squares of such numbers are not there in float32; zeros stay as they are.
        x = x / torch.linalg.vector_norm(x, torch.inf, dim=1, keepdim=True).clamp(min=LEAST)
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp(min=LEAST)
    unit: Tensor = x / length
    return unit


def offset_dtype(metric: Metric) -> torch.dtype:
    """Of cosines 16 bits say enough, of numbers of any size they do not."""
    return torch.float16 if metric == "cosine" else torch.float32


def offsets(
    x: Float32[Tensor, "n dim"], mean: Float32[Tensor, " dim"], metric: Metric
) -> Float32[Tensor, " n"]:
    """What each vector adds to its scores: ⟨μ, r⟩, or -‖r‖² of squared distances."""
    if metric == "l2":
        return -(x - mean).square().sum(1)
    # Row by row and on one thread: a product by a library depends on how many there are.
    along = np.einsum("ij,j->i", x.numpy(), mean.numpy())
    return torch.from_numpy(along) - mean.double().square().sum().float()


def asked(
    queries: Float32[Tensor, "nq dim"], mean: Float32[Tensor, " dim"], square: float, metric: Metric
) -> tuple[Float32[Tensor, "nq dim"], Float32[Tensor, " nq"], Float32[Tensor, " nq"]]:
    """What codes are multiplied with, what offsets are, and what is added; `square` is ‖μ‖².

    Sums are made in float64, row by row: rounded, they do not depend on how many rows there are.
    """
    if metric == "l2":
        moved = queries - mean
        return 2 * moved, torch.ones_like(moved[:, 0]), -moved.double().square().sum(1).float()
    along = (queries.double() * mean).sum(1).float()
    # Of a mean that is next to nothing, offsets are too small for their 16 bits, and t is large.
    share = along / square if square > LEAST_SQUARE[metric] else torch.zeros_like(along)
    # Two operations: one that does both rounds by where threads cut the rows.
    taken = share[:, None] * mean
    return queries - taken, share, along
