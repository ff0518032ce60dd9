"""Tables that the host makes, where kernels read them."""

import numpy as np
import torch
from torch import Tensor


def to_device(table: np.ndarray, device: torch.device) -> Tensor:
    """A table of the host's on a device. Neither waits for the other."""
    made = torch.from_numpy(table)
    if device.type == "cpu":
        return made
    if device.type == "cuda":
        # A copy from memory that may be paged out waits for everything that was launched before.
        made = made.pin_memory()
    return made.to(device, non_blocking=True)


def numbers_to_device(numbers: list[int], device: torch.device) -> Tensor:
    """`to_device` of whole numbers."""
    return to_device(np.array(numbers, dtype=np.int64), device)
