"""How many bytes a token takes where the layers of a model differ. Needs no vLLM.

vLLM gives all layers pages of one size: smaller ones get more tokens where the sizes divide, and
stay partly empty where they do not. The two bytes of scale beside each vector are enough to spoil
that (516 bytes of 512 coordinates are not twice the 260 of 256), so a few bytes are left empty.
"""

import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from sixfold.integrations.vllm.names import token_nbytes
from sixfold.packing import Bits


class LayerBlock(NamedTuple):
    """What the blocks of a layer hold: KV heads, coordinates of a key and a value, tokens."""

    kv_heads: int
    key_dim: int
    value_dim: int
    tokens: int


def aligned_nbytes(bits: Bits, own: LayerBlock, every: Sequence[LayerBlock]) -> int:
    """Bytes of a token of one head: `token_nbytes`, and the empty ones that make blocks fit.

    Args:
        bits: Bits a value.
        own: A layer's blocks.
        every: Those of all layers of the model that hold codes.
    """
    if own not in every:
        return token_nbytes(bits, own.key_dim, own.value_dim)
    return _aligned(bits, tuple(sorted(Counter(every).items())))[own]


@lru_cache(maxsize=16)
def _aligned(bits: Bits, counts: tuple[tuple[LayerBlock, int], ...]) -> dict[LayerBlock, int]:
    """The fewest bytes of all layers together, of which every block divides the largest."""
    least = {one: token_nbytes(bits, one.key_dim, one.value_dim) for one, _ in counts}
    # Of one byte a token and head.
    unit = {one: one.kv_heads * one.tokens for one in least}
    largest, step = max(unit[one] * least[one] for one in least), math.lcm(*unit.values())

    def held(contents: dict[LayerBlock, int]) -> float:
        """Bytes of a token: blocks that do not divide the largest are as large as that."""
        blocks = {one: unit[one] * content for one, content in contents.items()}
        most = max(blocks.values())
        sizes = {one: most if most % size else size for one, size in blocks.items()}
        return sum(count * sizes[one] / one.tokens for one, count in counts)

    choices = [least]
    for size in range(-(-largest // step) * step, 2 * largest + step, step):
        choices.append({one: _least_share(size // unit[one], least[one]) for one in least})
    return min(choices, key=held)


def _least_share(size: int, least: int) -> int:
    """The least of at least so many bytes that divides `size`, which is not less."""
    return next(size // parts for parts in range(size // least, 0, -1) if size % parts == 0)
