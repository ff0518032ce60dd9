"""In what dtype sums are made that must not depend on the order of their terms."""

from functools import cache

import torch

# Where nobody needs to ask.
_WITH_FLOAT64 = ("cpu", "cuda", "meta")


def wide(device: torch.device) -> torch.dtype:
    """float64; float32 on devices that have no other (Apple's and some of Intel's).

    Rounding a sum of float64 to float32 hides in which order its terms were added. Without, codes
    of one device may differ from those of another where a coordinate lies between two codewords.
    """
    if device.type in _WITH_FLOAT64 or _has_float64(device.type):
        return torch.float64
    return torch.float32


@cache
def _has_float64(device_type: str) -> bool:
    try:
        torch.ones(2, dtype=torch.float64, device=device_type).sum().item()
    except (TypeError, RuntimeError):
        return False
    return True
