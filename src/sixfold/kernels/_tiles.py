"""Tiling, so that no operation needs float memory of the size of its input."""

from collections.abc import Iterator

# 1 MB of float32: the handful of temporaries of a tile stay near the cores.
TILE_ELEMENTS = 1 << 18


def tiles(n: int, elements_each: int) -> Iterator[slice]:
    """Split range(n) into slices of at most `TILE_ELEMENTS` elements, but at least one item.

    An empty range is one empty slice, so that callers who concatenate need no special case.
    """
    step = max(1, TILE_ELEMENTS // max(1, elements_each))
    for start in range(0, max(n, 1), step):
        yield slice(start, min(start + step, n))


def page_tiles(batch: int, n_pages: int, elements_each: int) -> Iterator[tuple[slice, slice]]:
    """Split [batch, n_pages] pages into blocks of whole pages, whole sequences where they fit."""
    for rows in tiles(batch, n_pages * elements_each):
        for columns in tiles(n_pages, (rows.stop - rows.start) * elements_each):
            yield rows, columns
