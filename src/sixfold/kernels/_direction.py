"""What is quantized of a vector, its direction, and what its codes are multiplied by."""

import math

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from sixfold.kernels._wide import wide
from sixfold.kernels.rotate.reference import unnormalized
from sixfold.kernels.types import Scale


def rotated_direction(
    x: Float[Tensor, "*b dim"],
    turns: Float[Tensor, "rounds 2 half"],
    factor: Float[Tensor, "m m"],
) -> tuple[Float32[Tensor, "*b dim"], Float[Tensor, "*b"]]:
    """What is quantized: u = sqrt(dim)·R·x/‖x‖, and its unit ‖x‖/sqrt(dim)."""
    dim = x.shape[-1]
    x, power = _moderate(x)
    # In float64, because vector libraries round a float32 root to one of its two neighbours.
    norm = fold_sum(x * x).to(wide(x.device)).sqrt().float()
    valid = norm.isfinite() & (norm > 0)
    # The stretch of the unnormalised rotation and the variance of the codebook, in one product.
    stretch = torch.full_like(norm, math.pow(dim, 1 / 2 - len(turns) / 2)) / norm
    rotated = torch.where(valid[..., None], unnormalized(x, turns, factor), 0)
    u = (rotated * torch.where(valid, stretch, 0)[..., None]).contiguous()
    return u, norm.to(power.dtype) / power * dim**-0.5


def _moderate(
    x: Float[Tensor, "*b dim"],
) -> tuple[Float32[Tensor, "*b dim"], Float[Tensor, "*b"]]:
    """Multiply by a power of two, which is returned too, so that no square over- or underflows."""
    # Codes are discrete: there is no gradient to keep a graph for.
    x = x.detach()
    if x.dtype is torch.float64:
        exponent = torch.frexp(x.abs().amax(-1)).exponent.clamp(-1000, 1000)
        power = torch.ldexp(torch.ones_like(x[..., 0]), -exponent)
        return (x * power[..., None]).float(), power
    x = x.float()
    biased_exponent = x.abs().amax(-1).view(torch.int32) >> 23
    power = ((254 - biased_exponent).clamp(min=1) << 23).view(torch.float32)
    return x * power[..., None], power.to(wide(x.device))


def fold_sum(x: Float32[Tensor, "*b dim"]) -> Float32[Tensor, "*b"]:
    """Sum in an order that every backend keeps: halves are added until one number is left.

    Vectors are padded with zeros to a power of two.
    """
    size = 1 << (x.shape[-1] - 1).bit_length()
    x = torch.nn.functional.pad(x, (0, size - x.shape[-1]))
    while size > 1:
        size //= 2
        x = x[..., :size] + x[..., size:]
    return x.squeeze(-1)


def correction(u: Tensor, q: Tensor, scale: Scale) -> Tensor:
    """What multiplies ‖x‖/sqrt(dim), in the dtype of `wide`; 1 or finite for a zero vector."""
    dtype = wide(u.device)
    if scale == "norm":
        return torch.ones((), dtype=dtype, device=u.device)
    product = fold_sum(u * q).to(dtype)
    if scale == "optimal":
        return product / fold_sum(q * q).to(dtype)
    # ⟨u,u⟩ is dim but for rounding.
    product = torch.where(product > 0, product, 1)
    return torch.full_like(product, u.shape[-1]) / product
