"""One decode step of a layer on a GPU, all of it: what a model pays a layer and token."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_cases import CHUNK, Code, Shape, inputs
from sixfold.cache import CachePolicy, CompressedLayer, StaticLayer

Call: TypeAlias = Callable[[], Any]

# Steps that there is room for: more than any timing takes.
ROOM = 1 << 14


def compressed_step(
    batch: int, tokens: int, code: Code, shape: Shape, device: torch.device
) -> tuple[Call, int]:
    """Append a token to a static layer and attend: a call, and the bytes that the layer holds."""
    policy = CachePolicy(code.bits, code.bits, code=code.name)
    layer = None
    for start in range(0, tokens, CHUNK):
        _, keys, values = inputs(batch, min(CHUNK, tokens - start), shape, device)
        layer = layer or CompressedLayer(keys[:, :, :0], values[:, :, :0], policy)
        layer.append(keys, values)
        layer.compress()
    assert layer is not None
    held = sum(x.nbytes for x in layer.tensors())
    static = StaticLayer(layer, tokens + ROOM)
    query, key, value = inputs(batch, 1, shape, device)

    def step() -> Tensor:
        static.append(key, value)
        return static.attend(query, scaling=shape.dim**-0.5)

    return step, held


def plain_step(batch: int, tokens: int, shape: Shape, device: torch.device) -> tuple[Call, int]:
    """The same in bfloat16: write a token where there is room for it, and PyTorch's attention."""
    query, keys, values = inputs(batch, tokens, shape, device)
    _, key, value = inputs(batch, 1, shape, device)
    place = torch.tensor([tokens - 1], device=device)

    def step() -> Tensor:
        keys.index_copy_(2, place, key)
        values.index_copy_(2, place, value)
        return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    return step, keys.nbytes + values.nbytes


def compiled(call: Call) -> Call:
    """`call` as torch.compile makes it, without the host between its kernels where it can."""
    made: Call = torch.compile(call, fullgraph=True, mode="reduce-overhead")
    return made


def launches(call: Call) -> int:
    """Kernels that one call runs on the device."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch._C._autograd.DeviceType.CUDA for event in found.events())
