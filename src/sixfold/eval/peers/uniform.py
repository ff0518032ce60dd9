"""Uniform codes between the smallest and the largest of a group, as several peers store them."""

from jaxtyping import Float
from torch import Tensor


def minmax(x: Float[Tensor, "*groups size"], bits: int) -> Float[Tensor, "*groups size"]:
    """What 2^bits levels from the minimum to the maximum of every group keep of it.

    Scale and minimum stay in the dtype of `x`. A group of equal numbers is kept as it is.
    """
    low = x.amin(-1, keepdim=True)
    scale = (x.amax(-1, keepdim=True) - low) / (2**bits - 1)
    # 0/0, where all are equal, is the code 0.
    codes = ((x - low) / scale).nan_to_num(0.0).round().clamp(0, 2**bits - 1)
    read: Tensor = codes * scale + low
    return read
