"""Rotation by the compiled extension."""

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from sixfold.kernels._groups import DTYPES, memory, rotation_group
from sixfold.kernels._native import compiled
from sixfold.kernels.rotate import reference

_cpu = compiled()


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
    out = torch.empty(x.shape, dtype=torch.float32, device="cpu")
    n, threads = x.shape[:-1].numel(), torch.get_num_threads()
    _cpu.rotate(group, inverse, memory("x", x), DTYPES[x.dtype], out.data_ptr(), n, threads)
    return out
