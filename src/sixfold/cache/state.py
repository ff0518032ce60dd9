"""A layer's contents as named tensors and numbers, and back (docs/format.md)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sixfold._surroundings import outside_autocast
from sixfold.cache.affine import QueryEnergy
from sixfold.cache.code import PageCode
from sixfold.cache.coder import coders
from sixfold.cache.dense import DenseTokens
from sixfold.cache.key_maps import shared
from sixfold.cache.layer import CompressedLayer
from sixfold.cache.pages import Run, Slab
from sixfold.cache.policy import CachePolicy
from sixfold.cache.prefix import Prefix
from sixfold.cache.validate import check_values
from sixfold.errors import FormatError
from sixfold.io import DTYPE_NAMES, TensorSpec
from sixfold.kernels.types import KeyMap
from sixfold.packing import PAGE_TOKENS

# Far beyond any real count, and no sum of a few of them overflows.
MOST = 2**48
_PAGE_TENSORS = ("key_codes", "key_scales", "value_codes", "value_scales")


@outside_autocast
def layer_state(layer: CompressedLayer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Describe a layer and name its tensors; pages are listed in order, shared ones repeated.

    Raises:
        FormatError: It holds numbers that no reader would take, such as NaN.
    """
    window, code = layer.window, layer.code
    own = coders(layer.policy, window.keys.shape[3], window.values.shape[3])
    if not isinstance(code, PageCode) or (code.keys, code.values) != own:
        raise FormatError(
            f"a file holds the codes of {layer.policy}, and this layer codes by {code}."
        )
    tensors = {"window.keys": window.keys, "window.values": window.values, "padding": layer.padding}
    if window.attended is not None:
        tensors["window.attended"] = window.attended.to(torch.uint8)
    if layer.query_energy is not None:
        tensors["query_energy"] = layer.query_energy.squares
    if layer.prefix is not None:
        tensors |= _prefix_tensors(layer.prefix)
    runs = layer.history.runs
    for index, name in enumerate(_PAGE_TENSORS):
        parts = [run.slab.pool[index][run.slots] for run in runs]
        if parts:
            tensors[name] = torch.cat(parts, 1)
    batch, kv_heads, tokens, key_dim = window.keys.shape
    description = {
        "batch": batch,
        "kv_heads": kv_heads,
        "key_dim": key_dim,
        "value_dim": window.values.shape[3],
        "dtype": DTYPE_NAMES[window.keys.dtype],
        "window_tokens": tokens,
        "page_lengths": [n for run in runs for n in run.lengths.tolist()],
        "evicted": layer.evicted,
        "sinks": layer.prefix.sinks.tokens if layer.prefix else None,
        "query_energy": layer.query_energy is not None,
    }
    if window.attended is not None:
        description["attended"] = True
    waiting = layer.query_energy is not None and not layer.observed
    if waiting if layer.prefix is None else layer.prefix.assumed:
        description["assumed"] = True
    check_values(description, tensors)
    return description, tensors


def expected_tensors(
    description: Mapping[str, Any], policy: CachePolicy, sliding_window: int | None
) -> dict[str, TensorSpec]:
    """Shape and dtype of every tensor that `layer_state` would have stored.

    Raises:
        FormatError: The description is not one that `layer_state` writes.
    """
    try:
        specs = _expected(description) | _expected_pages(description, policy)
        _check_tokens(description, policy, sliding_window)
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"the description of a layer is damaged: {error!r}.") from error
    return specs


def tokens_seen(description: Mapping[str, Any]) -> int:
    """Tokens a sequence that a described layer has ever seen."""
    held: int = sum(description["page_lengths"]) + description["window_tokens"]
    return held + int(description["evicted"])


def restore_layer(
    description: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    policy: CachePolicy,
    sliding_window: int | None,
    pinned: KeyMap | None = None,
) -> CompressedLayer:
    """The layer that `layer_state` described; shapes and dtypes have been checked.

    Args:
        description: As `layer_state` gave it.
        tensors: Likewise.
        policy: Of the layer.
        sliding_window: Likewise.
        pinned: The map of all sequences, if it was given. Codes keep the map they were made with.

    Raises:
        FormatError: The tensors hold numbers that no layer holds.
    """
    check_values(description, tensors)
    attended = tensors.get("window.attended")
    window = DenseTokens(
        tensors["window.keys"],
        tensors["window.values"],
        None if attended is None else attended.bool(),
    )
    layer = CompressedLayer(window.keys, window.values, policy, sliding_window, pinned)
    layer.window = window
    layer.padding = tensors["padding"]
    layer.evicted = description["evicted"]
    if "query_energy" in tensors:
        layer.query_energy = QueryEnergy(tensors["query_energy"])
        layer.observed = not description.get("assumed", False)
    if description["sinks"] is not None:
        layer.prefix = Prefix(
            DenseTokens(tensors["sinks.keys"], tensors["sinks.values"]),
            tensors["padding"],
            tensors["padding"] + tensors["sinks.count"],
            _once(KeyMap(tensors["key_map.mean"], tensors["key_map.scale"]), layer.pinned),
            description.get("assumed", False),
        )
    lengths = torch.tensor(description["page_lengths"], dtype=torch.int64, device="cpu")
    if len(lengths):
        layer.history.runs = [_run(tensors, lengths)]
    return layer


def _once(stored: KeyMap, pinned: KeyMap | None) -> KeyMap:
    """The stored maps, in the memory of the pinned one where they are all that one."""
    if pinned is None or (stored.mean != pinned.mean).any() or (stored.scale != pinned.scale).any():
        return stored
    return shared(pinned, len(stored.mean))


def _run(tensors: Mapping[str, Tensor], lengths: Tensor) -> Run:
    batch, pages = tensors["key_codes"].shape[:2]
    slab = Slab.full([tensors[name].flatten(0, 1) for name in _PAGE_TENSORS])
    slots = torch.arange(batch * pages, device=lengths.device).view(batch, pages)
    return Run.of(slab, slots, lengths)


def whole(description: Mapping[str, Any], name: str, least: int = 0) -> int:
    """A number of a description.

    Raises:
        TypeError: It is none from `least` to `MOST`.
    """
    number = description[name]
    if type(number) is not int or not least <= number <= MOST:
        raise TypeError(f"{name} must be a whole number from {least} to {MOST}, got {number!r}")
    return number


def _check_tokens(
    description: Mapping[str, Any], policy: CachePolicy, sliding_window: int | None
) -> None:
    """How many tokens are held, and in what state, by a layer that has seen so many."""
    evicted, seen = whole(description, "evicted"), tokens_seen(description)
    needed = 0 if sliding_window is None else min(seen, sliding_window - 1)
    if evicted and (sliding_window is None or seen - evicted < needed):
        raise ValueError(f"evicted is {evicted}, with {needed} tokens of {seen} to be held")
    sinks = policy.sink_tokens if sliding_window is None else 0
    if description["sinks"] is not None and whole(description, "sinks") != sinks:
        raise ValueError(f"sinks is {description['sinks']}, expected {sinks}")
    flags = {"assumed": False, **description}
    for name in ("query_energy", "assumed"):
        if type(flags[name]) is not bool:
            raise TypeError(f"{name} must be true or false, got {flags[name]!r}")
    if description["query_energy"] and description["sinks"] is not None:
        raise ValueError("query_energy is kept only until there is a key map")


def _expected(description: Mapping[str, Any]) -> dict[str, TensorSpec]:
    names = ("batch", "kv_heads", "key_dim", "value_dim")
    batch, heads, key_dim, value_dim = (whole(description, name, 1) for name in names)
    window = whole(description, "window_tokens")
    dtype = description["dtype"]
    if dtype not in ("F64", "F32", "F16", "BF16"):
        raise TypeError(f"keys and values of dtype {dtype!r}")
    specs = {
        "window.keys": TensorSpec((batch, heads, window, key_dim), dtype),
        "window.values": TensorSpec((batch, heads, window, value_dim), dtype),
        "padding": TensorSpec((batch,), "I64"),
    }
    if description.get("attended"):
        specs["window.attended"] = TensorSpec((batch, window), "U8")
    if description["query_energy"]:
        specs["query_energy"] = TensorSpec((batch, heads, key_dim), "F32")
    if description["sinks"] is not None:
        sinks = whole(description, "sinks")
        specs |= {
            "sinks.keys": TensorSpec((batch, heads, sinks, key_dim), dtype),
            "sinks.values": TensorSpec((batch, heads, sinks, value_dim), dtype),
            "sinks.count": TensorSpec((batch,), "I64"),
            "key_map.mean": TensorSpec((batch, heads, key_dim), "F32"),
            "key_map.scale": TensorSpec((batch, heads, key_dim), "F32"),
        }
    return specs


def _expected_pages(description: Mapping[str, Any], policy: CachePolicy) -> dict[str, TensorSpec]:
    lengths = description["page_lengths"]
    if type(lengths) is not list or any(
        type(n) is not int or not 1 <= n <= PAGE_TOKENS for n in lengths
    ):
        raise TypeError(f"page lengths must be 1 to {PAGE_TOKENS}, got {lengths}")
    if not lengths:
        return {}
    if description["sinks"] is None:
        raise TypeError("pages without a key map")
    shape = description["batch"], len(lengths), description["kv_heads"]
    keys, values = coders(policy, description["key_dim"], description["value_dim"])
    return {
        "key_codes": TensorSpec((*shape, keys.page_bytes), "U8"),
        "key_scales": TensorSpec((*shape, PAGE_TOKENS), "F16"),
        "value_codes": TensorSpec((*shape, values.page_bytes), "U8"),
        "value_scales": TensorSpec((*shape, PAGE_TOKENS), "F16"),
    }


def _prefix_tensors(prefix: Prefix) -> dict[str, Tensor]:
    key_map = prefix.key_map.of_sequences()
    return {
        "sinks.keys": prefix.sinks.keys,
        "sinks.values": prefix.sinks.values,
        "padding": prefix.padding,
        "sinks.count": prefix.count,
        "key_map.mean": key_map.mean,
        "key_map.scale": key_map.scale,
    }
