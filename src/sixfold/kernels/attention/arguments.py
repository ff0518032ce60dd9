"""What compiled backends ask of their arguments alike."""

from functools import lru_cache

from torch import Tensor

from sixfold.errors import ShapeError
from sixfold.packing import PAGE_TOKENS, Bits, is_paired, n_symbols, row_bytes, symbol_bits


@lru_cache
def page_sizes(dim: int, bits: Bits) -> tuple[int, int, int, tuple[int, ...]]:
    """Bits a symbol, coordinates a symbol, bytes a page and shape of the codebook."""
    width, paired = symbol_bits(bits), is_paired(bits)
    size = PAGE_TOKENS * row_bytes(n_symbols(dim, bits), width)
    return width, 1 + paired, size, (1 << width, 2) if paired else (1 << width,)


def check_heads(heads: int, kv_heads: int) -> None:
    """Refuse query heads that do not share the KV heads evenly.

    Raises:
        ShapeError: They do not.
    """
    if kv_heads == 0 or heads % kv_heads:
        raise ShapeError(
            f"query: expected a multiple of the {kv_heads} KV heads of key_pages, got {heads} "
            "heads; pass the pages of this layer."
        )


def mask_strides(mask: Tensor, batch: int, heads: int, queries: int) -> tuple[int, int, int]:
    """Strides of a mask by sequence, head and query; 0 on broadcast axes.

    Raises:
        ShapeError: It is no mask of these sizes.
    """
    try:
        by_batch, by_head, by_query, _ = mask.expand(batch, heads, queries, -1).stride()
    except RuntimeError:
        raise ShapeError(
            f"mask: expected [{batch} or 1, {heads} or 1, {queries}, positions], got "
            f"{list(mask.shape)}; pass one row a query."
        ) from None
    return by_batch, by_head, by_query
