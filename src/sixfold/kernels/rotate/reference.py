"""Rotation in plain PyTorch."""

import math

import torch
from jaxtyping import Float, Float32
from torch import Tensor


def rotate(
    x: Float[Tensor, "*b dim"],
    signs: Float[Tensor, "rounds dim"],
    factor: Float[Tensor, "m m"],
    inverse: bool = False,
) -> Float32[Tensor, "*b dim"]:
    """See `sixfold.kernels.rotate.rotate`."""
    batch, dim, size = x.shape[:-1], x.shape[-1], len(factor)
    # [dim, n]: every addition then runs over contiguous vectors, whatever its stride in dim.
    y = x.float().reshape(batch.numel(), dim).mT.contiguous()
    if inverse:
        for sign in signs.flip(0):
            y = _walsh_hadamard(_multiply(factor.mT, y), size) * sign[:, None]
    else:
        for sign in signs:
            y = _walsh_hadamard(_multiply(factor, y * sign[:, None]), size)
    y = y * math.pow(dim // size, -len(signs) / 2)
    return y.mT.contiguous().view(x.shape)


def _multiply(matrix: Tensor, x: Tensor) -> Tensor:
    size = len(matrix)
    if size == 1:
        return x
    # Added up in float64, so that rounding hides the order of additions: a vector's codes must
    # depend neither on the batch it came in nor on the matrix library.
    blocks = torch.unflatten(x.double(), 0, (-1, size))
    return torch.matmul(matrix.double(), blocks).flatten(0, 1).float()


def _walsh_hadamard(x: Tensor, size: int) -> Tensor:
    """Unnormalised transform of [dim, n] over blocks of `size` coordinates."""
    stride = size
    while stride < len(x):
        low, high = torch.unflatten(x, 0, (-1, 2, stride)).unbind(1)
        x = torch.stack((low + high, low - high), dim=1).flatten(0, 2)
        stride *= 2
    return x
