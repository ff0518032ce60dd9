"""What people wrap models in."""

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from sixfold.errors import UnsupportedModelError

# torch.compile; data parallelism (DataParallel, DistributedDataParallel, Accelerate, DeepSpeed).
_INNER = ("_orig_mod", "module")


def unwrapped(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model within `model`, which PEFT, compilation or parallelism wraps.

    Raises:
        UnsupportedModelError: There is none.
    """
    inner: object = model
    while not isinstance(inner, PreTrainedModel):
        found = next(_inner(inner), None)
        if found is None:
            raise UnsupportedModelError(
                f"expected a transformers PreTrainedModel, got {type(model).__name__}; for another "
                "framework use sixfold.cache.CompressedLayer."
            )
        inner = found
    return inner


def _inner(model: object) -> Iterator[torch.nn.Module]:
    if not isinstance(model, torch.nn.Module):
        return
    # PEFT's own way to it: its adapters stay within.
    if callable(base := getattr(model, "get_base_model", None)):
        yield base()
    for name in _INNER:
        if isinstance(module := getattr(model, name, None), torch.nn.Module):
            yield module
