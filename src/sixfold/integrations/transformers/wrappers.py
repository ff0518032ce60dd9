"""What people wrap models in."""

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from sixfold.errors import UnsupportedModelError

# torch.compile; data parallelism (DataParallel, DistributedDataParallel, Accelerate, DeepSpeed);
# optimum-quanto, whose wrapper is no module; trl, whose models have a head of their own.
_INNER = ("_orig_mod", "module", "_wrapped", "pretrained_model")
# Where there are more wrappers than that, one leads to itself.
_DEEPEST = 32
# Methods of PEFT that learn keys and values.
_OWN_CACHE = ("PREFIX_TUNING", "CARTRIDGE")


def unwrapped(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model within `model`, which PEFT, compilation or parallelism wraps.

    Raises:
        UnsupportedModelError: There is none, or what wraps it brings a cache of its own.
    """
    for inner in _layers(model):
        if isinstance(inner, PreTrainedModel):
            return inner
        _refuse_prefix(inner)
    raise UnsupportedModelError(
        f"expected a transformers PreTrainedModel, got {type(model).__name__}: if it wraps one, "
        "pass that; for another framework use sixfold.cache.CompressedLayer."
    )


def learned_prompt(model: object) -> torch.nn.Module | None:
    """What computes the tokens that PEFT's prompt tuning puts before every prompt, if it does.

    It is no part of the transformers model, and what it computes is in every cache.
    """
    for inner in _layers(model):
        prompts = getattr(inner, "prompt_encoder", None)
        if isinstance(prompts, torch.nn.ModuleDict) and not isinstance(inner, PreTrainedModel):
            active = getattr(inner, "active_adapter", None)
            return prompts[active] if isinstance(active, str) and active in prompts else prompts
    return None


def _layers(model: object) -> Iterator[object]:
    """What wraps a transformers model, from the outside, and last the model."""
    for _ in range(_DEEPEST):
        if model is None:
            return
        yield model
        if isinstance(model, PreTrainedModel):
            return
        model = next(_inner(model), None)


def _refuse_prefix(model: object) -> None:
    kind = getattr(getattr(model, "active_peft_config", None), "peft_type", None)
    if getattr(kind, "value", kind) in _OWN_CACHE:
        raise UnsupportedModelError(
            f"{type(model).__name__} puts a cache of its own, of learned keys and values, in place "
            "of the one it is given: let it prefill a DynamicCache, then use "
            "TurboQuantCache.from_cache(cache, model.get_base_model())."
        )


def _inner(model: object) -> Iterator[torch.nn.Module]:
    # PEFT's own way to it: its adapters stay within.
    if callable(base := getattr(model, "get_base_model", None)):
        yield base()
    # Models with adapters of several kinds lack that way: their tuner holds the model.
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, PreTrainedModel):
        inner = getattr(tuner, "model", None)
        if isinstance(inner, torch.nn.Module):
            yield inner
    for name in _INNER:
        if isinstance(module := getattr(model, name, None), torch.nn.Module):
            yield module
    # A tuner by itself. Last: wrappers that ask their model for what they lack have its names too.
    if hasattr(model, "peft_config") and isinstance(
        module := getattr(model, "model", None), torch.nn.Module
    ):
        yield module
