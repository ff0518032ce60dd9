"""Rotation by the compiled extension."""

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from sixfold.errors import ShapeError
from sixfold.kernels._native import address, compiled, memory
from sixfold.kernels.rotate import reference

_cpu = compiled()

# As csrc/vectors.h numbers them.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def rotation_group(dim: int, turns: Tensor, factor: Tensor) -> tuple[int, int, int, int, int]:
    """What the extension takes for a rotation: dim, order, rounds and two addresses.

    Raises:
        ShapeError: The tensors are no rotation of `dim` coordinates.
    """
    rounds, order = len(turns), len(factor)
    blocks = dim // order if order else 0
    # Rounds work on blocks of 4 rows of the factor: all orders above 2 that Hadamard matrices have.
    valid = order == dim if rounds == 0 else order == 1 or order % 4 == 0
    if not valid or blocks * order != dim or blocks & (blocks - 1) or (rounds and dim % 2):
        raise ShapeError(
            f"expected a factor of order m with dim = m·2^k (m = 1 or a multiple of 4; m = dim "
            f"without rounds), got order {order}, {rounds} rounds and dim {dim}; take both "
            f"tensors from one sixfold.rotation.Rotation({dim})"
        )
    turns_address = address("turns", turns, torch.float32, (rounds, 2, dim // 2))
    factor_address = address("factor", factor, torch.float32, (order, order))
    return dim, order, rounds, turns_address, factor_address


def rotate(
    x: Float[Tensor, "*b dim"],
    turns: Float[Tensor, "rounds 2 half"],
    factor: Float[Tensor, "m m"],
    inverse: bool = False,
) -> Float32[Tensor, "*b dim"]:
    """See `sixfold.kernels.rotate.rotate`."""
    if x.requires_grad and torch.is_grad_enabled():
        return reference.rotate(x, turns, factor, inverse)
    group = rotation_group(x.shape[-1], turns, factor)
    if x.dtype not in DTYPES:
        x = x.float()
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=torch.float32)
    n, threads = x.shape[:-1].numel(), torch.get_num_threads()
    _cpu.rotate(group, inverse, memory("x", x), DTYPES[x.dtype], out.data_ptr(), n, threads)
    return out
