"""How many tokens vLLM's blocks hold, as vLLM counts them. Needs no vLLM."""

from collections.abc import Sequence
from dataclasses import dataclass

from sixfold.cache.accounting import LayerShape
from sixfold.errors import SixfoldError
from sixfold.integrations.vllm.names import token_nbytes
from sixfold.packing import Bits

# What vLLM's CPU platform takes without --block-size; from 0.33 on it asks us, and takes a page.
BLOCK_TOKENS = 128


@dataclass(frozen=True)
class BlockCapacity:
    """What fits in a memory.

    Attributes:
        block_bytes: Of one block, all layers together.
        blocks: How many there are.
        tokens: They hold.
    """

    block_bytes: int
    blocks: int
    tokens: int


def block_capacity(
    shapes: Sequence[LayerShape], bits: Bits | None, memory: int, block_tokens: int = BLOCK_TOKENS
) -> BlockCapacity:
    """Blocks of a model whose attention layers are all alike.

    Args:
        shapes: Of the attention layers.
        bits: Bits a value; None: uncompressed, two bytes a value.
        memory: Bytes for blocks.
        block_tokens: Tokens of a block, a multiple of 64.

    Raises:
        SixfoldError: Layers differ: vLLM pools their memory in its own way.
    """
    first = shapes[0]
    if any(one != first for one in shapes) or first.sliding_window is not None:
        raise SixfoldError(
            "vLLM's blocks are predicted for models whose attention layers are all alike and "
            "without sliding windows; for this one read the capacity in vLLM's log"
        )
    dims = first.key_dim, first.value_dim
    token = 2 * sum(dims) if bits is None else token_nbytes(bits, *dims)
    layer = token * first.kv_heads * block_tokens
    # As vLLM divides: the same number for every layer.
    blocks = memory // layer // len(shapes)
    return BlockCapacity(layer * len(shapes), blocks, blocks * block_tokens)
