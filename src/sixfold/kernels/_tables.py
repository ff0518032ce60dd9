"""Tables that would lead outside of what they are tables of are refused before they are read."""

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from sixfold.errors import ShapeError
from sixfold.kernels.types import KeyMap, Pages, Past, Tokens
from sixfold.packing import PAGE_TOKENS

DEBUG_VARIABLE = "SIXFOLD_DEBUG"
# Sums of positions must not overflow.
MOST_TOKENS = 2**62


def check_table(name: str, slots: Tensor, count: int) -> None:
    """Refuse slots that are not 0 to `count` - 1.

    Tables on a GPU are looked at only under `SIXFOLD_DEBUG=1`: it means to wait for the device.

    Raises:
        ShapeError: There is one.
    """
    if readable(slots):
        _refuse(
            (slots < 0) | (slots >= count),
            slots,
            f"{name}: expected slots 0 to {count - 1}",
            "pass the memory that the table was made for",
        )


def check_pages(pages: Pages) -> None:
    """`check_table` of the page table, and the same for lengths and positions of pages.

    Raises:
        ShapeError: One of them is out of range.
    """
    starts, lengths, slots = pages.starts, pages.lengths, pages.slots
    keys, key_scales, values, value_scales = (x.shape for x in pages.pool)
    alike = keys[:2] == values[:2] and key_scales == value_scales == (*keys[:2], PAGE_TOKENS)
    if not alike or any(
        x.shape not in (slots.shape, (1, slots.shape[1])) for x in (starts, lengths)
    ):
        raise ShapeError(
            f"pages: expected pools of as many slots and heads each, {PAGE_TOKENS} scales a page, "
            f"and starts and lengths of [batch or 1, {slots.shape[1]}], got pools "
            f"{[list(x.shape) for x in pages.pool]}, starts {list(starts.shape)} and lengths "
            f"{list(lengths.shape)}."
        )
    for name, x in zip(pages.pool._fields, pages.pool, strict=True):
        if x.device != slots.device:
            raise ShapeError(
                f"pages.pool.{name} is on {x.device}, pages.slots on {slots.device}: move one."
            )
    check_table("pages.slots", slots, keys[0])
    if readable(lengths):
        wrong = (lengths < 0) | (lengths > PAGE_TOKENS)
        _refuse(wrong, lengths, f"pages.lengths: expected 0 to {PAGE_TOKENS} tokens a page")
    if readable(starts):
        wrong = (starts < -pages.first) | (starts > MOST_TOKENS - pages.first)
        _refuse(wrong, starts, "pages.starts: expected positions from 0")


def check_map(key_map: KeyMap, batch: int) -> None:
    """Refuse maps that are not one for every sequence.

    Raises:
        ShapeError: There are others, or an index leads outside of them.
    """
    mean, index = key_map.mean, key_map.map_index
    if mean.shape != key_map.scale.shape or len(mean if index is None else index) != batch:
        raise ShapeError(
            f"key_map: expected a mean and a scale of one shape, and a map for each of {batch} "
            f"sequences, got {list(mean.shape)} and {list(key_map.scale.shape)}"
            f"{'' if index is None else f', and an index {list(index.shape)}'}."
        )
    if index is not None:
        check_table("key_map.map_index", index, len(mean))


def sequence_maps(
    key_map: KeyMap | None, batch: int, heads: int, dim: int
) -> tuple[Tensor | None, Tensor | None]:
    """Means and scales of channels for every sequence, as kernels read them: contiguous float32.

    Raises:
        ShapeError: They are not [batch, heads, dim].
    """
    if key_map is None:
        return None, None
    check_map(key_map, batch)
    if key_map.mean.shape[1:] != (heads, dim):
        raise ShapeError(
            f"key_map: expected maps [{heads}, {dim}], got {list(key_map.mean.shape[1:])}."
        )
    mean, scale, _ = key_map.of_sequences()
    return mean.detach().float().contiguous(), scale.detach().float().contiguous()


def check_positions(name: str, x: Tensor | None) -> None:
    """Refuse positions before 0, and those that a number of queries could not be added to.

    Raises:
        ShapeError: There is one.
    """
    if x is None:
        return
    if x.is_floating_point() or x.is_complex() or x.dtype is torch.bool:
        raise ShapeError(f"{name}: expected whole numbers, got {x.dtype}.")
    if readable(x):
        wide = x.long()
        _refuse((wide < 0) | (wide > MOST_TOKENS), x, f"{name}: expected positions from 0")


def check_layer(
    query: Tensor,
    tokens: Sequence[Tokens],
    past: Past,
    dims: tuple[int, int],
    position: Tensor,
    sink_logits: Tensor | None,
) -> None:
    """Refuse parts of a layer that would have to be broadcast to fit its queries.

    Raises:
        ShapeError: There is one, or something is missing.
    """
    batch, heads, _, dim = query.shape
    kv_heads = past.key_map.mean.shape[1]
    if not query.is_floating_point() or dim != dims[0]:
        raise ShapeError(
            f"query: expected floating point of {dims[0]} coordinates, got {query.dtype} "
            f"{list(query.shape)}."
        )
    _check_shape("position", position, (batch,))
    _check_shape("past.start", past.start, (batch,))
    _check_shape("key_map.mean", past.key_map.mean, (len(past.key_map.mean), kv_heads, dim))
    if sink_logits is not None:
        _check_shape("sink_logits", sink_logits, (heads,))
    for part in (*past.kept, *tokens):
        rows, count = part.keys.shape[0], part.keys.shape[2]
        for name in ("first", "start", "stop", "slots"):
            x = getattr(part, name)
            if x is not None or name in ("first", "start"):
                _check_shape(f"tokens.{name}", x, (batch,))
        rows = batch if part.slots is None else rows
        for name, x, size in zip(("keys", "values"), part[:2], dims, strict=True):
            _check_shape(f"tokens.{name}", x, (rows, kv_heads, count, size))
            if x.dtype != part.keys.dtype:
                raise ShapeError(f"tokens.{name}: expected {part.keys.dtype}, got {x.dtype}.")


def _check_shape(name: str, x: Tensor | None, shape: tuple[int, ...]) -> None:
    if x is None or x.shape != shape:
        got = None if x is None else list(x.shape)
        raise ShapeError(f"{name}: expected {list(shape)}, got {got}.")


def check_columns(mask: Tensor, positions: Tensor) -> None:
    """Refuse a mask that has no column for a position.

    Raises:
        ShapeError: It has none.
    """
    if readable(positions) and positions.numel() and int(positions.max()) >= mask.shape[-1]:
        raise ShapeError(
            f"mask: expected a column for every position up to {int(positions.max())}, got "
            f"{mask.shape[-1]} columns; pass a mask that covers all tokens held"
        )


def readable(x: Tensor) -> bool:
    """Whether a table may be looked at: on the CPU, or on a GPU if that is asked for."""
    if torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu" or os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0")


def _refuse(wrong: Tensor, x: Tensor, expected: str, advice: str = "count tokens anew") -> None:
    if wrong.any():
        where = wrong.nonzero()[0].tolist()
        raise ShapeError(f"{expected}, got {int(x[tuple(where)])} at {where}; {advice}")
