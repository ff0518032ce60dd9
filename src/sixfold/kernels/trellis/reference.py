"""The trellis in plain PyTorch: Viterbi's search, and codewords of windows."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Float16, Float32, Int32, Int64, UInt8
from torch import Tensor

from sixfold.kernels._direction import correction, rotated_direction
from sixfold.kernels._tiles import tiles
from sixfold.kernels.rotate.reference import rotate
from sixfold.kernels.trellis.grid import SearchGrid, search_grid
from sixfold.kernels.types import Scale
from sixfold.packing import Bits, decode_scale, encode_scale
from sixfold.trellis import advances, pack_path, path_bytes, unpack_path, window_bits

# Windows on either side of the seam that choose where the path begins and ends. README.md has what
# fewer and more are worth.
_SEAM_WINDOWS = 8
# Steps between subtractions of the least sum.
_PERIOD = 2
# The search keeps a cost for at most half the states of every coordinate; a tile counts one in 32
# of them, which makes it 32 MB at most.
_UNCOUNTED = 64


def encode(
    x: Float[Tensor, "*b dim"],
    turns: Float[Tensor, "rounds 2 half"],
    factor: Float[Tensor, "m m"],
    codewords: Float32[Tensor, " states"],
    *,
    bits: Bits,
    scale: Scale,
) -> tuple[UInt8[Tensor, "*b path_bytes"], Float16[Tensor, "*b"]]:
    """See `sixfold.kernels.trellis.encode`."""
    batch, dim = x.shape[:-1], x.shape[-1]
    vectors = x.reshape(batch.numel(), dim)
    size = path_bytes(dim, bits)
    rows = torch.empty(len(vectors), size, dtype=torch.uint8, device=x.device)
    scales = torch.empty(len(vectors), dtype=torch.float16, device=x.device)
    for tile in tiles(len(vectors), len(codewords) * -(-dim // _UNCOUNTED)):
        u, unit = rotated_direction(vectors[tile], turns, factor)
        path = search(u, codewords, bits)
        rows[tile] = pack_path(path, bits)
        # A path of hardly more than one window may point away from a vector, where nearest
        # codewords never do; a negative scale would be read as a large one.
        factors = correction(u, codewords[path], scale).clamp(min=0)
        scales[tile] = encode_scale(unit * factors)
    return rows.view(*batch, size), scales.view(batch)


def search(
    u: Float32[Tensor, "n dim"], codewords: Float32[Tensor, " states"], bits: Bits
) -> Int32[Tensor, "n dim"]:
    """The cyclic path whose codewords are nearest to each vector, or nearly.

    The bits that the last window shares with the first are taken from the best free path around
    the seam; given them, the path is the best there is.
    """
    dim, widths = u.shape[1], advances(u.shape[1], bits)
    grid = search_grid(codewords, bits)
    # Coordinates first: every operation of the search then runs over contiguous vectors.
    places = grid.places(u).mT.contiguous()
    margin = seam_margin(len(codewords), bits)
    last, first = widths[-1], -margin % dim
    repeats = -(-(first + 2 * margin) // dim)
    around = slice(first, first + 2 * margin)
    free = _viterbi(
        torch.cat([places] * repeats)[around], grid, (widths * repeats)[around], widths[first - 1]
    )
    seam = free[margin] & ((len(codewords) >> last) - 1)
    path = _viterbi(places, grid, widths, before=last, seam=seam).mT.int()
    # Where sums have stopped growing the path may miss the seam: what is read is what is stored.
    return unpack_path(pack_path(path, bits), dim, bits, len(codewords))


def seam_margin(states: int, bits: Bits) -> int:
    """Coordinates on either side of the seam that choose it."""
    return math.ceil(_SEAM_WINDOWS * window_bits(states) / bits)


def _viterbi(
    places: Int32[Tensor, "steps n"],
    grid: SearchGrid,
    advances: Sequence[int],
    before: int,
    seam: Int64[Tensor, " n"] | None = None,
) -> Int64[Tensor, "steps n"]:
    """The path of least cost; of equals, at every step from the last, the lowest state.

    Args:
        places: Vectors on the grid.
        grid: What its costs are.
        advances: Bits that leave the window after each step, the lowest first.
        before: Bits that left it before the first step.
        seam: The bits that were left then, and must be left after the last step. Free without.
    """
    states, n = len(grid.words), places.shape[1]
    # kept[b]: least cost of all paths whose window holds the bits b once the lowest have left.
    kept = places.new_zeros(states >> before, n)
    if seam is not None:
        kept.fill_(grid.most).scatter_(0, seam[None], 0)
    history = []
    for step, (place, advance) in enumerate(zip(places, advances, strict=True), 1):
        history.append(kept)
        # The bits that enter are the highest: every value of them goes on from the same `kept`.
        sums = grid.costs(place, grid.words[:, None]).view(1 << before, *kept.shape) + kept
        kept = sums.clamp(max=grid.most).view(states >> advance, 1 << advance, n).amin(1)
        if step % _PERIOD == 0:
            kept = kept - kept.amin(0)
        before = advance
    return _trace(places, grid, advances, history, kept.argmin(0) if seam is None else seam)


def _trace(
    places: Int32[Tensor, "steps n"],
    grid: SearchGrid,
    advances: Sequence[int],
    history: Sequence[Tensor],
    kept: Int64[Tensor, " n"],
) -> Int64[Tensor, "steps n"]:
    """Follow the least costs, `history` [kept, n] before every step, back from the bits kept last.

    The few costs it needs are computed again: cheaper than noting every decision.
    """
    path = []
    for place, advance, before in reversed([*zip(places, advances, history, strict=True)]):
        left = torch.arange(1 << advance, device=places.device)[:, None]
        choices = kept << advance | left
        origins = choices & (len(before) - 1)
        cost = (grid.costs(place, grid.words[choices]) + before.gather(0, origins)).clamp(
            max=grid.most
        )
        best = cost.argmin(0, keepdim=True)
        path.append(choices.gather(0, best)[0])
        kept = origins.gather(0, best)[0]
    return torch.stack(path[::-1])


def decode(
    rows: UInt8[Tensor, "*b path_bytes"],
    scales: Float16[Tensor, "*b"],
    turns: Float[Tensor, "rounds 2 half"],
    factor: Float[Tensor, "m m"],
    codewords: Float32[Tensor, " states"],
    *,
    dim: int,
    bits: Bits,
) -> Float32[Tensor, "*b {dim}"]:
    """See `sixfold.kernels.trellis.decode`."""
    flat_scales = decode_scale(scales.reshape(-1, 1))
    flat_rows = rows.reshape(len(flat_scales), rows.shape[-1])
    vectors = torch.empty(len(flat_rows), dim, dtype=torch.float32, device=rows.device)
    for tile in tiles(len(vectors), dim):
        expanded = expand(flat_rows[tile], codewords, dim=dim, bits=bits) * flat_scales[tile]
        vectors[tile] = rotate(expanded, turns, factor, inverse=True)
    return vectors.view(*scales.shape, dim)


def scores(
    queries: Float32[Tensor, "*b nq dim"],
    rows: UInt8[Tensor, "*b n path_bytes"],
    scales: Float16[Tensor, "*b n"],
    codewords: Float32[Tensor, " states"],
    *,
    bits: Bits,
) -> Float32[Tensor, "*b nq n"]:
    """See `sixfold.kernels.trellis.scores`."""
    *batch, n_queries, dim = queries.shape
    n = rows.shape[-2]
    products = queries.new_empty(*batch, n_queries, n)
    for tile in tiles(n, math.prod(batch) * dim):
        expanded = expand(rows[..., tile, :], codewords, dim=dim, bits=bits)
        # Scales last: a NaN scale must not reach the other columns of the product.
        products[..., tile] = queries @ expanded.mT * decode_scale(scales[..., None, tile])
    return products


def expand(
    rows: UInt8[Tensor, "*b path_bytes"],
    codewords: Float32[Tensor, " states"],
    *,
    dim: int,
    bits: Bits,
) -> Float32[Tensor, "*b {dim}"]:
    """Codewords of packed rows, before any scale."""
    return codewords[unpack_path(rows, dim, bits, len(codewords))]
