"""Memory for slabs."""

import math
import mmap
from contextlib import suppress

import torch
from torch import Tensor

HUGE = 2 * 2**20


def empty(*size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty`, where large tensors on the CPU are in huge pages if the system has any.

    A head's page of codes is about as long as a small page of memory: attention would wait for the
    translation of nearly every address. The memory is fresh, as what an allocator hands out again
    is in small pages already, and goes back to the system with the tensor.
    """
    count = math.prod(size)
    whole = count * dtype.itemsize // HUGE * HUGE
    if device.type != "cpu" or not whole or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=dtype, device=device)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, count * dtype.itemsize + HUGE, flags=flags)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % HUGE
    # Memory works without.
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE, start, whole)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=start).view(size)
