"""Rotation in Triton: a tile of vectors in registers, one read and one write."""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32
from torch import Tensor

from sixfold.kernels._triton import launch
from sixfold.kernels._triton.operators import operator
from sixfold.kernels._triton.rotate import coordinates, inside, unnormalized
from sixfold.kernels.rotate import reference


@triton.jit
def rotate_kernel(
    x,
    turns,
    factor,
    out,
    count,
    SHRINK: tl.constexpr,
    N: tl.constexpr,
    DIM: tl.constexpr,
    ROUNDS: tl.constexpr,
    ORDER: tl.constexpr,
    SIZE: tl.constexpr,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """N vectors a program; x and out are [count, DIM]."""
    vector = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    offset = vector[:, None] * DIM + coordinates(SIZE, INNER, WIDTH)[None, :]
    mask = (vector < count)[:, None] & inside(DIM, SIZE, INNER, WIDTH)[None, :]
    tile = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    tile = unnormalized(tile, turns, factor, DIM, ROUNDS, ORDER, SIZE, INNER, WIDTH, BLOCK, INVERSE)
    tl.store(out + offset, tile * SHRINK, mask=mask)


def rotate(
    x: Float[Tensor, "*b dim"],
    turns: Float[Tensor, "rounds 2 half"],
    factor: Float[Tensor, "m m"],
    inverse: bool = False,
) -> Float32[Tensor, "*b dim"]:
    """See `sixfold.kernels.rotate.rotate`."""
    if x.requires_grad and torch.is_grad_enabled():
        return reference.rotate(x, turns, factor, inverse)
    rotated: Tensor = _rotate(x, turns, factor, inverse)
    return rotated


def _rotated_shape(x: Tensor, turns: Tensor, factor: Tensor, inverse: bool) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


@operator("rotate(Tensor x, Tensor turns, Tensor factor, bool inverse) -> Tensor", _rotated_shape)
def _rotate(x: Tensor, turns: Tensor, factor: Tensor, inverse: bool) -> Tensor:
    dim, count = x.shape[-1], x.shape[:-1].numel()
    constants = launch.rotation(dim, turns, factor)
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    tile = launch.tile(constants)
    if count:
        rotate_kernel[(triton.cdiv(count, tile["N"]),)](
            x.float() if x.dtype is torch.float64 else x,
            turns.contiguous(),
            factor.contiguous(),
            out,
            count,
            SHRINK=launch.shrink(constants),
            INVERSE=inverse,
            **tile,
            **constants,
            **launch.EXACT,
        )
    return out
