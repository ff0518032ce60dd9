"""Layers in one memory: vLLM lends its blocks to one KV cache group after another."""

from typing import Literal

from torch import Tensor


def overlap(one: Tensor, other: Tensor) -> Literal["none", "same", "mixed"]:
    """Which blocks of two caches [blocks, ...] lie in the same memory.

    Returns:
        none: None do.
        same: Those of the same number, and no others.
        mixed: Some, in a way that numbers do not tell.
    """
    if one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr():
        return "none"
    distance = other.data_ptr() - one.data_ptr()
    if distance >= _span(one) or -distance >= _span(other):
        return "none"
    if one.stride() != other.stride() or one.shape != other.shape:
        return "mixed"
    if not distance:
        return "same"
    step, block = one.stride(0) * one.element_size(), _span(one[0])
    # Blocks of several layers may lie one beside the other.
    return "none" if block <= abs(distance) % step <= step - block else "mixed"


def _span(x: Tensor) -> int:
    """Bytes from its first element to its last."""
    pairs = zip(x.shape, x.stride(), strict=True)
    return (sum((size - 1) * stride for size, stride in pairs) + 1) * x.element_size()
