"""The highest scores in plain PyTorch."""

import math

import torch
from jaxtyping import Bool, Float32, Int64, UInt8
from torch import Tensor

from sixfold.kernels._codewords import expand
from sixfold.kernels._tiles import tiles
from sixfold.kernels.types import VectorPages, VectorPart
from sixfold.packing import PAGE_TOKENS, decode_scale, from_pages


def nearest(
    queries: Float32[Tensor, "nq coordinates"],
    weights: Float32[Tensor, " nq"],
    constants: Float32[Tensor, " nq"],
    pages: VectorPages,
    *,
    best: int,
) -> tuple[Float32[Tensor, "nq {best}"], Int64[Tensor, "nq {best}"]]:
    """See `sixfold.kernels.nearest.nearest`."""
    n_queries, count = len(queries), len(pages.allowed)
    scores = queries.new_full((n_queries, best), -math.inf)
    slots = torch.full((n_queries, best), -1, dtype=torch.int64, device=queries.device)
    for tile in tiles(count, PAGE_TOKENS * max(queries.shape[1], n_queries)):
        some = VectorPages(
            [VectorPart(x.codes[tile], x.scales[tile], x.coding) for x in pages.parts],
            None if pages.offsets is None else pages.offsets[tile],
            pages.allowed[tile],
        )
        found = _scores(queries, weights, some) + constants[:, None]
        found = found.masked_fill(~_bits(some.allowed).flatten(), -math.inf)
        places = torch.arange(found.shape[1], device=queries.device) + tile.start * PAGE_TOKENS
        scores, slots = _merged(scores, slots, found, places.expand_as(found), best)
    return scores, slots.masked_fill(scores == -math.inf, -1)


def _scores(
    queries: Float32[Tensor, "nq coordinates"],
    weights: Float32[Tensor, " nq"],
    pages: VectorPages,
) -> Float32[Tensor, "nq vectors"]:
    products = queries.new_zeros(len(queries), pages.allowed.shape[0] * PAGE_TOKENS)
    asked = queries.split([part.coding.dim for part in pages.parts], 1)
    for (codes, scales, coding), own in zip(pages.parts, asked, strict=True):
        rows = from_pages(codes, *coding.row, "key").flatten(0, 1)
        codewords = expand(rows, coding.centroids, dim=coding.dim, bits=coding.bits)
        products += own @ codewords.mT * decode_scale(scales).flatten()
    if pages.offsets is None:
        return products
    return products + weights[:, None] * pages.offsets.flatten().float()


def _bits(allowed: UInt8[Tensor, "pages 8"]) -> Bool[Tensor, "pages 64"]:
    shifts = torch.arange(8, dtype=torch.uint8, device=allowed.device)
    return (allowed[..., None] >> shifts & 1).flatten(1).bool()


def _merged(
    scores: Tensor, slots: Tensor, more: Tensor, places: Tensor, best: int
) -> tuple[Tensor, Tensor]:
    """The best of both; of equal scores those that come first, which are those of lower slots."""
    scores, slots = torch.cat([scores, more], 1), torch.cat([slots, places], 1)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return scores[:, :best], slots.gather(1, order[:, :best])
