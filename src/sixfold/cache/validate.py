"""What the numbers of a stored layer must satisfy before anything computes with them."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sixfold.errors import FormatError
from sixfold.packing import decode_scale

# No model's keys and values come near; products of what is below it stay finite in float32.
LARGEST = 2.0**40
LARGEST_CHANNEL_SCALE = 2.0**20
LARGEST_ENERGY = 2.0**100


def check_values(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Check every number that could crash, hang or poison what reads it.

    Vectors of pages that a sink or the end of their page hides are left out: nobody reads them.

    Args:
        description: Of a layer, checked against its tensors by `sixfold.cache.state`.
        tensors: What is stored of it.

    Raises:
        FormatError: Padding or sinks reach beyond the tokens held, or a number that is read is not
            finite, too large, or of the wrong sign.
    """
    held = sum(description["page_lengths"]) + description["window_tokens"]
    padding, count = tensors["padding"], torch.zeros_like(tensors["padding"])
    if description["sinks"] is None:
        _require((padding >= 0) & (padding <= held + description["evicted"]), "padding")
    else:
        count = tensors["sinks.count"]
        # Compared one by one: a sum of two numbers of a file could overflow.
        _require((padding >= 0) & (padding <= held), "padding")
        _require((count >= 0) & (count <= description["sinks"]), "sinks.count")
        _require(count <= held - padding, "sinks.count")
        _check_prefix(tensors, count)
    if "query_energy" in tensors:
        energy = tensors["query_energy"]
        _require((energy >= 0) & (energy <= LARGEST_ENERGY), "query_energy")
    if "window.attended" in tensors:
        _require(tensors["window.attended"] <= 1, "window.attended")
    for name in ("window.keys", "window.values"):
        _require(_bounded(tensors[name]), name)
    if description["page_lengths"]:
        # Sinks after padding that no mask has shown may yet be read from the pages.
        hidden = torch.zeros_like(count) if description.get("assumed") else count
        _check_pages(description["page_lengths"], tensors, padding, hidden)


def check_finite(name: str, x: Tensor) -> None:
    """Check a tensor that is kept uncompressed.

    Raises:
        FormatError: A number is not finite, or too large.
    """
    _require(torch.linalg.vector_norm(x.flatten().float(), torch.inf) <= LARGEST, name)


def check_map(mean: Tensor, scale: Tensor) -> None:
    """Check the numbers of a key map.

    Raises:
        FormatError: One is not finite or too large, or a scale is not positive.
    """
    _require(mean.abs() <= LARGEST, "key_map.mean")
    usable = (scale >= 1 / LARGEST_CHANNEL_SCALE) & (scale <= LARGEST_CHANNEL_SCALE)
    _require(usable, "key_map.scale")


def _check_prefix(tensors: Mapping[str, Tensor], count: Tensor) -> None:
    slots = torch.arange(tensors["sinks.keys"].shape[2], device=count.device)
    for name in ("sinks.keys", "sinks.values"):
        _require((slots >= count[:, None]) | _bounded(tensors[name]), name)
    check_map(tensors["key_map.mean"], tensors["key_map.scale"])


def _check_pages(
    lengths: list[int], tensors: Mapping[str, Tensor], padding: Tensor, count: Tensor
) -> None:
    """Scales of the vectors that are read; whatever their codes are, they can be."""
    length = torch.tensor(lengths, device=padding.device)
    rows = torch.arange(tensors["key_scales"].shape[-1], device=padding.device)
    # [batch, pages, rows], counted from the first sink.
    positions = (length.cumsum(0) - length)[:, None] + rows - padding[:, None, None]
    sinks = (positions >= 0) & (positions < count[:, None, None])
    for name in ("key_scales", "value_scales"):
        largest = decode_scale(tensors[name]).amax(2)
        _require(sinks | (rows >= length[:, None]) | (largest <= LARGEST), name)


def _bounded(x: Float[Tensor, "batch heads tokens dim"]) -> Bool[Tensor, "batch tokens"]:
    """Tokens whose numbers are finite and not too large: comparisons with NaN are false."""
    # A norm needs no copy of its operand; in float32, because LARGEST is infinity in float16.
    largest: Tensor = torch.linalg.vector_norm(x, torch.inf, (1, 3))
    return largest.float() <= LARGEST


def _require(satisfied: Tensor, name: str) -> None:
    if not bool(satisfied.all()):
        raise FormatError(
            f"{name} has numbers that no cache holds: expected them finite, of a possible sign and "
            f"size (docs/format.md, section 8), {int((~satisfied).sum())} are not."
        )
