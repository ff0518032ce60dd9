"""Rotation in plain PyTorch."""

import math

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from sixfold.kernels._wide import wide


def rotate(
    x: Float[Tensor, "*b dim"],
    turns: Float[Tensor, "rounds 2 half"],
    factor: Float[Tensor, "m m"],
    inverse: bool = False,
) -> Float32[Tensor, "*b dim"]:
    """See `sixfold.kernels.rotate.rotate`."""
    shrink = math.pow(x.shape[-1], -len(turns) / 2)
    return unnormalized(x, turns, factor, inverse) * shrink


def unnormalized(
    x: Float[Tensor, "*b dim"],
    turns: Float[Tensor, "rounds 2 half"],
    factor: Float[Tensor, "m m"],
    inverse: bool = False,
) -> Float32[Tensor, "*b dim"]:
    """Rotate and stretch by dim^(rounds/2): for callers who scale the result anyway."""
    batch, dim = x.shape[:-1], x.shape[-1]
    # [dim, n]: every addition then runs over contiguous vectors, whatever its stride in dim.
    y = x.float().reshape(batch.numel(), dim).mT.contiguous()
    if len(turns) == 0:
        y = _dense(factor.mT if inverse else factor, y)
    elif inverse:
        for cosine, sine in turns.flip(0):
            y = _turn(_multiply(factor.mT, _walsh_hadamard(y, len(factor))), cosine, -sine)
    else:
        for cosine, sine in turns:
            y = _walsh_hadamard(_multiply(factor, _turn(y, cosine, sine)), len(factor))
    return y.mT.contiguous().view(x.shape)


def _dense(matrix: Tensor, x: Tensor) -> Tensor:
    # Added up in float64, so that rounding hides the order of additions: a vector's codes must
    # depend neither on the batch it came in nor on the matrix library.
    dtype = wide(x.device)
    return torch.matmul(matrix.to(dtype), x.to(dtype)).float()


def _turn(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate the planes of coordinates i and i + dim/2 of [dim, n]."""
    low, high = x.chunk(2)
    cosine, sine = cosine[:, None], sine[:, None]
    return torch.cat((cosine * low - sine * high, sine * low + cosine * high))


def _multiply(matrix: Tensor, x: Tensor) -> Tensor:
    """±1 matrix times every block of its size, in ascending order of columns."""
    size = len(matrix)
    if size == 1:
        return x
    blocks = torch.unflatten(x, 0, (-1, size))
    product = matrix[:, :1] * blocks[:, :1]
    for column in range(1, size):
        # Exact products: fused or not, the sum is rounded once.
        product.addcmul_(matrix[:, column, None], blocks[:, column, None])
    return product.flatten(0, 1)


def _walsh_hadamard(x: Tensor, size: int) -> Tensor:
    """Unnormalised transform of [dim, n] over blocks of `size` coordinates."""
    stride = size
    while stride < len(x):
        low, high = torch.unflatten(x, 0, (-1, 2, stride)).unbind(1)
        x = torch.stack((low + high, low - high), dim=1).flatten(0, 2)
        stride *= 2
    return x
