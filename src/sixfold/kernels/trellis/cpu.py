"""The trellis by the compiled extension."""

from functools import lru_cache
from typing import Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Float16, Float32, Int16, UInt8
from torch import Tensor

from sixfold._surroundings import outside_inference_mode
from sixfold.errors import ShapeError
from sixfold.kernels._groups import DTYPES, LAYOUTS, SCALES, address, memory, rotation_group
from sixfold.kernels._native import compiled
from sixfold.kernels.trellis import reference
from sixfold.kernels.trellis.grid import search_grid
from sixfold.kernels.types import Scale
from sixfold.packing import Bits, Layout
from sixfold.trellis import STATES, path_bytes, window_bits

_cpu = compiled()

PathGroup: TypeAlias = tuple[int, int, int, int, int]
GridGroup: TypeAlias = tuple[int, int, float, int, int]


def path_group(
    dim: int, bits: Bits, codewords: Tensor, layout: Layout | Literal["rows"] = "rows"
) -> PathGroup:
    """Paths as csrc/python/trellis.cpp takes them.

    Raises:
        ShapeError: There is no trellis of so many states.
    """
    states = len(codewords)
    if states not in STATES:
        raise ShapeError(f"codewords: expected one of {STATES}, got {states} of them.")
    book = address("codewords", codewords, torch.float32, (states,))
    return dim, window_bits(states), int(2 * bits), LAYOUTS[layout], book


class Search(NamedTuple):
    """What the search of a codebook takes."""

    grid: GridGroup
    words: Int16[Tensor, "states 2"]
    """What `grid` has the address of: to be kept while the extension reads it."""


def search_of(codewords: Tensor, bits: Bits) -> Search:
    """The search of these codewords, from memory where it was made before.

    Raises:
        ShapeError: Complementing a state does not negate its codeword.
    """
    # By their numbers, since others may have come to lie at the same address.
    return _made_search(codewords.detach().numpy().tobytes(), bits)


@lru_cache(typed=True)
@outside_inference_mode
def _made_search(numbers: bytes, bits: Bits) -> Search:
    codewords = torch.frombuffer(bytearray(numbers), dtype=torch.float32)
    # Kernels find the costs of states of opposite bits together.
    if not torch.equal(codewords, -codewords.flip(0)):
        raise ShapeError("codewords: expected opposite ones for states of opposite bits.")
    grid = search_grid(codewords, bits)
    # Each twice: the search reads pairs.
    words = grid.words.to(torch.int16)[:, None].expand(-1, 2).contiguous()
    margin = reference.seam_margin(len(codewords), bits)
    group = words.data_ptr(), int(grid.half), float(grid.rate), grid.intervals, margin
    return Search(group, words)


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
    if x.dtype not in DTYPES:
        # Normalised in float64, which is not worth a kernel.
        return reference.encode(x, turns, factor, codewords, bits=bits, scale=scale)
    batch, dim = x.shape[:-1], x.shape[-1]
    rotation, path = rotation_group(dim, turns, factor), path_group(dim, bits, codewords)
    found = search_of(codewords, bits)
    x, n = x.detach().contiguous(), batch.numel()
    rows = torch.empty(*batch, path_bytes(dim, bits), dtype=torch.uint8, device="cpu")
    scales = torch.empty(batch, dtype=torch.float16, device="cpu")
    _cpu.encode_paths(
        rotation,
        (path, found.grid),
        SCALES[scale],
        memory("x", x),
        DTYPES[x.dtype],
        rows.data_ptr(),
        scales.data_ptr(),
        n,
        torch.get_num_threads(),
    )
    return rows, scales


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
    rotation, path = rotation_group(dim, turns, factor), path_group(dim, bits, codewords)
    rows, scales = rows.contiguous(), scales.contiguous()
    codes = address("rows", rows, torch.uint8, (*scales.shape, path_bytes(dim, bits)))
    stored = address("scales", scales, torch.float16, scales.shape)
    out = torch.empty(*scales.shape, dim, dtype=torch.float32, device="cpu")
    n, threads = scales.numel(), torch.get_num_threads()
    _cpu.decode_paths(rotation, path, codes, stored, out.data_ptr(), n, threads)
    return out


def scores(
    queries: Float32[Tensor, "*b nq dim"],
    rows: UInt8[Tensor, "*b n path_bytes"],
    scales: Float16[Tensor, "*b n"],
    codewords: Float32[Tensor, " states"],
    *,
    bits: Bits,
) -> Float32[Tensor, "*b nq n"]:
    """See `sixfold.kernels.trellis.scores`."""
    if queries.requires_grad and torch.is_grad_enabled():
        return reference.scores(queries, rows, scales, codewords, bits=bits)
    *batch, n_queries, dim = queries.shape
    n, path = scales.shape[-1], path_group(dim, bits, codewords)
    queries, rows, scales = queries.contiguous(), rows.contiguous(), scales.contiguous()
    asked = address("queries", queries, torch.float32, (*batch, n_queries, dim))
    codes = address("rows", rows, torch.uint8, (*batch, n, path_bytes(dim, bits)))
    stored = address("scales", scales, torch.float16, (*batch, n))
    products = torch.empty(*batch, n_queries, n, dtype=torch.float32, device="cpu")
    _cpu.score_paths(
        path,
        codes,
        stored,
        scales.shape[:-1].numel(),
        n,
        asked,
        n_queries,
        products.data_ptr(),
        torch.get_num_threads(),
    )
    return products
