"""Where the layers of a model compute, which is not always where their weights lie."""

import torch
from torch import nn
from transformers import PreTrainedModel


def execution_device(module: nn.Module) -> torch.device:
    """Where `module` computes: where accelerate moves its inputs, else where its weights are."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        # A sequence of hooks holds others, the one that moves inputs among them.
        for candidate in getattr(hook, "hooks", (hook,)):
            device = getattr(candidate, "execution_device", None)
            if device is not None:
                return torch.device(device)
    found = (x.device for x in module.parameters() if x.device.type != "meta")
    return next(found, torch.device("cpu"))


def layer_devices(model: PreTrainedModel) -> dict[int, torch.device]:
    """Where every attention layer computes, by its number in the cache."""
    found: dict[int, torch.device] = {}
    for module in model.get_decoder().modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int):
            found.setdefault(index, execution_device(module))
    return found
