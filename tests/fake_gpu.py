"""Tensors of a GPU that is not there: they have shapes, strides and a place, and no data."""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

GPU = torch.device("cuda:0")


class FakeGpu(TorchFunctionMode):
    """Within it, tensors can be put on `GPU`, and calculated with; those of the CPU are real.

    A number of a tensor, or how many entries of a mask are true, they refuse to tell. Two devices
    in one operation are an error, as on a device.

    Attributes:
        waits: Functions that copied from the GPU.
        uploads: Functions that copied to it.
    """

    # One for all, as tables of codes are kept for as long as a process lives.
    fakes = FakeTensorMode(allow_non_fake_inputs=True)

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.uploads: list[str] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = _pytree.tree_leaves((args, kwargs or {}))
        places = [x.device.type for x in given if isinstance(x, Tensor)]
        if "cuda" not in places and not any(_is_gpu(x) for x in given):
            return function(*args, **(kwargs or {}))
        with self.fakes:
            out = OPERATORS.get(function, function)(*args, **(kwargs or {}))
        if "cuda" in places and isinstance(out, Tensor) and out.device.type == "cpu":
            self.waits.append(str(function))
        if places and set(places) == {"cpu"}:
            self.uploads.append(str(function))
        return out

    def place(self, x: Tensor) -> Tensor:
        """One like it on the GPU."""
        with self.fakes:
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=GPU)


def _is_gpu(x: Any) -> bool:
    return isinstance(x, torch.device) and x.type == "cuda"


def _indexed(x: Tensor, index: Any, *value: Any) -> Tensor:
    """By views and operators; with a value, it is written there."""
    indices: list[Tensor | None] = []
    dim = 0
    given = list(index) if isinstance(index, tuple) else [index]
    for place, one in enumerate(given):
        if one is Ellipsis:
            taken = sum(y is not None and y is not Ellipsis for y in given)
            given[place : place + 1] = [slice(None)] * (x.ndim - taken)
    for one in given:
        if isinstance(one, int):
            x = x.select(dim, one)
            continue
        if isinstance(one, slice):
            assert one.step is None
            x = torch.ops.aten.slice(x, dim, one.start, one.stop)
        elif one is None:
            x = x.unsqueeze(dim)
        if isinstance(one, Tensor) and one.dtype is torch.bool:
            raise RuntimeError("a mask as an index waits for the GPU, to count what is true")
        indices.append(one if isinstance(one, Tensor) else None)
        dim += 1
    tensors = any(one is not None for one in indices)
    if not value:
        return torch.ops.aten.index(x, indices) if tensors else x
    new = value[0] if isinstance(value[0], Tensor) else x.new_full((), value[0])
    assert new.device == x.device
    return torch.ops.aten.index_put_(x, indices, new) if tensors else torch.ops.aten.copy_(x, new)


def _moved(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A fake of it, elsewhere: torch 2.6 would move the real one, and ask a driver for that."""
    fake = x if isinstance(x, FakeTensor) else FakeGpu.fakes.from_tensor(x)
    return fake.to(*args, **kwargs)


def _attended(query: Tensor, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """By operators: the function asks a driver which of its kernels the GPU can run."""
    attend = torch.ops.aten._scaled_dot_product_attention_math
    out: Tensor = attend(query, keys, values, *args, **kwargs)[0]
    return out


# What Python calls asks a driver for the device first.
OPERATORS = {
    Tensor.__getitem__: _indexed,
    Tensor.__setitem__: _indexed,
    Tensor.to: _moved,
    torch.nn.functional.scaled_dot_product_attention: _attended,
    Tensor.copy_: torch.ops.aten.copy_,
    Tensor.__invert__: torch.ops.aten.bitwise_not,
    Tensor.contiguous: torch.ops.aten.contiguous,
}
