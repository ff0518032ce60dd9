"""Vectors to norms and directions."""

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from sixfold.kernels._wide import wide


def normalize(
    x: Float[Tensor, "*b dim"],
) -> tuple[Float[Tensor, "*b"], Float32[Tensor, "*b dim"]]:
    """Norms and unit vectors; the direction of a zero or non-finite vector is zero.

    The squares are added in float64 (or see `wide`), where their order does not show once the norm
    is rounded to float32; the division is in float32 (in float64 for float64 vectors). No finite
    vector overflows.
    """
    # Codes are discrete: there is no gradient to keep a graph for.
    x = x.detach()
    if x.dtype is torch.float64:
        # The square of a float64 may overflow; that of any other dtype fits a float64.
        peak = x.abs().amax(-1, keepdim=True)
        x = x / torch.where(peak > 0, peak, 1)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        unit, norm = (x / norm).float(), norm * peak
    else:
        x = x.float()
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide(x.device))
        unit = x / norm.float().clamp(max=torch.finfo(torch.float32).max)
    return norm.squeeze(-1), torch.where(norm.isfinite() & (norm > 0), unit, 0)
