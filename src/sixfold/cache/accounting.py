"""Bytes of a cache before it exists: the same count as `nbytes`, from shapes alone."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from sixfold.arguments import MOST_COORDINATES, sequence, settle, shown, whole
from sixfold.cache.affine import MIN_TOKENS
from sixfold.cache.coder import Coder, coders
from sixfold.cache.policy import CachePolicy
from sixfold.errors import SixfoldError
from sixfold.packing import PAGE_TOKENS

INT64, FLOAT32, FLOAT16 = 8, 4, 2


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """What one attention layer stores a token.

    Attributes:
        kv_heads: Key-value heads.
        key_dim: Dimension of a key.
        value_dim: Dimension of a value.
        sliding_window: Tokens a query sees, itself included; None for all.
        policy: How this layer is compressed; None if it stays in full precision.

    Raises:
        SixfoldError: A field is none of that.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    sliding_window: int | None = None
    policy: CachePolicy | None = None

    def __post_init__(self) -> None:
        names = ("kv_heads", "key_dim", "value_dim")
        sizes = {name: whole(name, getattr(self, name), 1, MOST_COORDINATES) for name in names}
        window = self.sliding_window
        if window is not None:
            window = whole("sliding_window", window, 1)
        settle(self, **sizes, sliding_window=window)
        if not isinstance(self.policy, CachePolicy | None):
            raise SixfoldError(f"policy must be a CachePolicy or None, got {shown(self.policy)}")

    def visible(self, tokens: int) -> int:
        """Tokens of `tokens` that an uncompressed cache holds."""
        return tokens if self.sliding_window is None else min(tokens, self.sliding_window - 1)

    @property
    def sinks(self) -> int:
        """First tokens kept in full precision: none where a sliding window leaves them behind."""
        return self.policy.sink_tokens if self.policy and self.sliding_window is None else 0


def uncompressed_nbytes(
    shapes: Sequence[LayerShape], *, tokens: int, batch: int = 1, element_size: int = 2
) -> int:
    """Bytes of the same tokens in a 16-bit cache (or `element_size` bytes a value).

    Raises:
        SixfoldError: `shapes` are no `LayerShape`, or a number is none.
    """
    shapes, tokens, batch, element_size = _checked(shapes, tokens, batch, element_size)
    return sum(
        batch * s.kv_heads * (s.key_dim + s.value_dim) * s.visible(tokens) * element_size
        for s in shapes
    )


def cache_nbytes(
    shapes: Sequence[LayerShape], *, tokens: int, batch: int = 1, element_size: int = 2
) -> int:
    """Bytes a compressed cache holds after a prefill of `tokens` tokens a sequence.

    Args:
        shapes: The model's attention layers.
        tokens: Tokens a sequence; they arrive in one chunk, so no slab has slack. Growing
            adds at most 1/16 of the codes, and room for up to 15 tokens in full precision.
        batch: Sequences.
        element_size: Bytes a value of the model's dtype: windows and sinks are kept in it.

    Returns:
        Exactly `TurboQuantCache.nbytes` of such a cache, its shared tables counted once, where
        every sequence has a key map of its own. (Where no queries are seen, that saves a few bytes
        before the first page.)

    Raises:
        SixfoldError: `shapes` are no `LayerShape`, or a number is none.
    """
    shapes, tokens, batch, element_size = _checked(shapes, tokens, batch, element_size)
    layers = sum(_layer_nbytes(shape, tokens, batch, element_size) for shape in shapes)
    used = {coder for shape in shapes if _pages(shape, tokens) for coder in _coders(shape)}
    return layers + _table_nbytes(used)


def _checked(
    shapes: Any, tokens: Any, batch: Any, element_size: Any
) -> tuple[list[LayerShape], int, int, int]:
    shapes = sequence("shapes", shapes)
    if strange := [x for x in shapes if not isinstance(x, LayerShape)]:
        raise SixfoldError(f"shapes must be of type LayerShape, got {shown(strange[0])}")
    counts = (("tokens", tokens, 0), ("batch", batch, 0), ("element_size", element_size, 1))
    tokens, batch, element_size = (whole(name, count, least) for name, count, least in counts)
    return shapes, tokens, batch, element_size


def _layer_nbytes(shape: LayerShape, tokens: int, batch: int, element_size: int) -> int:
    held = shape.visible(tokens)
    dense = batch * shape.kv_heads * (shape.key_dim + shape.value_dim) * element_size
    if shape.policy is None:
        # Behind a sliding window transformers keeps the whole first chunk alive, and a number.
        return tokens * dense + (INT64 if shape.sliding_window else 0)
    pages = _pages(shape, tokens)
    if pages == 0:
        # Until the first page: left padding, and the energy of the queries.
        energy = batch * shape.kv_heads * shape.key_dim * FLOAT32
        return held * dense + batch * INT64 + energy
    codes = sum(coder.page_bytes + PAGE_TOKENS * FLOAT16 for coder in _coders(shape))
    table = (batch + 2) * INT64
    key_map = 2 * batch * shape.kv_heads * shape.key_dim * FLOAT32
    return (
        (held - pages * PAGE_TOKENS + shape.sinks) * dense
        + pages * (batch * shape.kv_heads * codes + table)
        + key_map
        + 3 * batch * INT64  # padding, in tokens held and in tokens ever seen; sinks that exist
    )


def _pages(shape: LayerShape, tokens: int) -> int:
    if shape.policy is None or tokens < max(shape.sinks + MIN_TOKENS, shape.policy.least_tokens):
        return 0
    return max(0, shape.visible(tokens) - shape.policy.recent_window) // PAGE_TOKENS


def _coders(shape: LayerShape) -> tuple[Coder, Coder]:
    assert shape.policy is not None
    return coders(shape.policy, shape.key_dim, shape.value_dim)


def _table_nbytes(coders: set[Coder]) -> int:
    tables = [x for coder in coders for x in coder.tables(torch.device("cpu"))]
    return sum({x.data_ptr(): x.nbytes for x in tables}.values())
