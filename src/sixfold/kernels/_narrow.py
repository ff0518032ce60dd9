"""Results in the dtype of what they came from."""

import torch
from torch import Tensor

_FLOAT16_MAX = torch.finfo(torch.float16).max


def narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`; what is finite stays so.

    Decoding may carry a number past the largest float16 it came from, and an average of such
    numbers too; it is then that largest number. Infinity and NaN stay what they are. Of the other
    dtypes only numbers that float32 itself cannot rotate come near the end.
    """
    if dtype is torch.float16 and x.dtype is not dtype:
        x = torch.where(x.isinf(), x, x.clamp(-_FLOAT16_MAX, _FLOAT16_MAX))
    return x.to(dtype)
