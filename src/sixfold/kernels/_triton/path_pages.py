"""Vectors to pages of paths on a GPU: directions, search, scales, some pages at a time."""

from functools import cache

import torch
from torch import Tensor

from sixfold.kernels._groups import half_bits
from sixfold.kernels._triton import launch
from sixfold.kernels._triton.encode_paths import path_vectors_kernel
from sixfold.kernels._triton.operators import in_place, operator
from sixfold.kernels._triton.search import kept_rows, search_kernel
from sixfold.kernels.trellis.grid import grid_sizes
from sixfold.kernels.trellis.reference import seam_margin
from sixfold.kernels.types import Scale
from sixfold.packing import PAGE_TOKENS, Bits, Layout
from sixfold.trellis import PAGE_STATES

# Vectors a program searches: one a lane of its only warp.
_LANES = 32
# Searches at a time: one for every scheduler of a multiprocessor.
_PROGRAMS_PER_MULTIPROCESSOR = 4
# The interpreter has no multiprocessors, and pays by the operation, whatever its size.
INTERPRETED_PROGRAMS = 4
_INTERPRETED_LANES = PAGE_TOKENS


@operator(
    "encode_path_pages(Tensor x, Tensor? mean, Tensor? channel_scale, Tensor turns, "
    "Tensor factor, Tensor codewords, Tensor(a!) pages, Tensor(b!) scales, Tensor slots, "
    "float bits, str scale, str layout) -> ()",
    in_place,
)
def encode_path_pages(
    x: Tensor,
    mean: Tensor | None,
    channel_scale: Tensor | None,
    turns: Tensor,
    factor: Tensor,
    codewords: Tensor,
    pages: Tensor,
    scales: Tensor,
    slots: Tensor,
    bits: float,
    scale: Scale,
    layout: Layout,
) -> None:
    """`encode_pages` of a trellis."""
    dim, heads = x.shape[-1], x.shape[1]
    rotation = launch.rotation(dim, turns, factor)
    launch.codebook(dim, bits, codewords, "trellis")
    launch.check_pages(pages, scales, dim, bits, "trellis")
    launch.check_vectors(x, scales, slots)
    if not slots.numel() * heads:
        return
    slots, count = slots.contiguous(), slots.numel()
    constants, sizes = search_constants(dim, bits, layout), grid_sizes(bits)
    parts = PAGE_TOKENS // constants["N"]
    at_once = min(count, max(1, _programs(x.device) // (parts * heads)))
    places = x.new_empty((at_once, heads, dim, PAGE_TOKENS), dtype=torch.int16)
    words = x.new_empty(PAGE_STATES, dtype=torch.int16)
    rows = kept_rows(constants["HALF_BITS"])
    history = torch.empty(
        (at_once * parts, heads, constants["STEPS"], rows, constants["N"]),
        dtype=torch.uint8 if sizes.most == 0xFF else torch.int16,
        device=x.device,
    )
    turns, factor, codewords = turns.contiguous(), factor.contiguous(), codewords.contiguous()
    for first in range(0, count, at_once):
        part = slots.view(-1)[first : first + at_once]
        grid, tile = launch.page_grid(part, heads, rotation, least=4)
        for searched in (False, True):
            if searched:
                search_kernel[(len(part) * parts, heads)](
                    places,
                    words,
                    history,
                    pages,
                    slots,
                    first,
                    *pages.stride()[:2],
                    heads,
                    **constants,
                    num_warps=1,
                    num_stages=1,
                )
            path_vectors_kernel[grid](
                x,
                mean,
                channel_scale,
                turns,
                factor,
                codewords,
                places,
                words,
                pages,
                scales,
                slots,
                first,
                slots.shape[1],
                heads,
                *x.stride(),
                *pages.stride()[:2],
                *scales.stride()[:2],
                SEARCHED=searched,
                UNIT=sizes.unit,
                INTERVALS=sizes.intervals,
                LARGEST=sizes.largest,
                HALF_BITS=constants["HALF_BITS"],
                HAS_MEAN=mean is not None,
                HAS_SCALE=channel_scale is not None,
                LAYOUT=layout,
                STRETCH=launch.stretch(rotation),
                SCALE=scale,
                **tile,
                **rotation,
                **launch.EXACT,
            )


def search_constants(dim: int, bits: Bits, layout: Layout) -> dict[str, int | bool]:
    """What of a call's shapes the search is compiled for."""
    margin = seam_margin(PAGE_STATES, bits)
    return {
        "DIM": dim,
        "HALF_BITS": half_bits(bits, "trellis"),
        "MARGIN": margin,
        "STEPS": max(dim, 2 * margin),
        "MOST": grid_sizes(bits).most,
        "KEYS": layout == "key",
        "N": _INTERPRETED_LANES if launch.interpreted() else _LANES,
    }


@cache
def _programs(device: torch.device) -> int:
    if device.type == "cpu":
        return INTERPRETED_PROGRAMS
    properties = torch.cuda.get_device_properties(device)
    return _PROGRAMS_PER_MULTIPROCESSOR * properties.multi_processor_count
