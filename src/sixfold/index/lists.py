"""Inverted lists: which vectors lie together, so that a search may look at some of them alone.

A list is what lies nearest to a centroid of k-means (spherical of cosines, whose vectors and
centroids have length 1). Centroids are held, and found, as vectors are: with 8 bits a coordinate,
whose error is far below the distance of two of them.

Source: Sivic and Zisserman, Video Google (ICCV 2003); k-means by Lloyd's iterations.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from sixfold.index.code import CPU, VectorCode
from sixfold.index.metric import Metric, prepared
from sixfold.index.segment import Segment

CENTROID_BITS = 8
MOST_LISTS = 2**20
# Vectors a list that centroids are fitted to, and how often: more change next to nothing.
FITTED_TO = 64
# Their coordinates, unless there are more lists than that: half a gigabyte.
MOST_NUMBERS = 2**27
ROUNDS = 10
# Coordinates that are taken apart at a time.
SOME_NUMBERS = 2**22


def usual_lists(count: int) -> int:
    """How many lists so many vectors are cut into: looking for lists costs as much as one holds."""
    return max(1, round(math.sqrt(count)))


def fitted_centroids(segments: Sequence[Segment], lists: int) -> Float32[Tensor, "lists dim"]:
    """Centroids of the vectors of an index, in their basis."""
    code, metric = segments[0].code, segments[0].metric
    generator = torch.Generator().manual_seed(code.seed)
    most = max(lists, min(lists * FITTED_TO, MOST_NUMBERS // code.dim))
    x = _sample(segments, most, generator)
    chosen = torch.randperm(len(x), generator=generator, device=CPU)[:lists].sort().values
    centroids = prepared(x[chosen], metric)
    for _ in range(ROUNDS):
        owner = _nearest(x, centroid_segment(centroids, code, nearness(metric)))
        centroids = _moved(x, owner, centroids, metric)
    return centroids


def centroid_segment(
    centroids: Float32[Tensor, "lists dim"], code: VectorCode, metric: Metric
) -> Segment:
    """Centroids as vectors that are searched for."""
    ids = np.arange(len(centroids))
    mean = centroids.double().mean(0).float()
    made = Segment.allocate(centroid_code(code), metric, mean, len(ids), ids.dtype)
    return made.append(centroids, ids, len(ids))


def centroid_code(code: VectorCode) -> VectorCode:
    """How centroids of vectors of this code are held."""
    return VectorCode.plain(code.dim, CENTROID_BITS, code.seed)


def nearness(metric: Metric) -> Metric:
    """By what a vector has its list: of inner products long centroids would take all."""
    return "l2" if metric == "ip" else metric


def owners(segment: Segment, centroids: Segment) -> Int64[np.ndarray, " live"]:
    """The list of each vector that counts, in order."""
    found = [_nearest(x, centroids) for x in _decoded(segment, segment.live_slots())]
    return torch.cat(found).numpy()


def _decoded(
    segment: Segment, slots: Int64[np.ndarray, " n"]
) -> Iterator[Float32[Tensor, "some dim"]]:
    """Vectors as codes have them, piece by piece."""
    step = _some(segment.code.dim)
    for start in range(0, len(slots), step):
        yield segment.decoded(slots[start : start + step])


def _nearest(x: Float32[Tensor, "n dim"], centroids: Segment) -> Int64[Tensor, " n"]:
    parts = x.split(_some(x.shape[1]))
    return torch.cat([centroids.search(x, 1, centroids.allowed)[1] for x in parts]).squeeze(1)


def _some(dim: int) -> int:
    """Vectors of that dimension that are taken apart at a time."""
    return max(64, SOME_NUMBERS // dim)


def _sample(
    segments: Sequence[Segment], most: int, generator: torch.Generator
) -> Float32[Tensor, "n dim"]:
    """Some of the vectors that count, as codes have them."""
    live = sum(segment.live for segment in segments)
    chosen = torch.randperm(live, generator=generator, device=CPU)[:most].sort().values.numpy()
    found, before = list[Tensor](), 0
    for segment in segments:
        own = chosen[(chosen >= before) & (chosen < before + segment.live)] - before
        found += _decoded(segment, segment.live_slots()[own])
        before += segment.live
    return torch.cat(found)


def _moved(
    x: Float32[Tensor, "n dim"],
    owner: Int64[Tensor, " n"],
    centroids: Float32[Tensor, "lists dim"],
    metric: Metric,
) -> Float32[Tensor, "lists dim"]:
    """Means of what each list has; one that has nothing begins anew at a vector."""
    counts = torch.bincount(owner, minlength=len(centroids))
    sums = torch.zeros(centroids.shape, dtype=torch.float64, device=CPU)
    some = _some(x.shape[1])
    for own, part in zip(owner.split(some), x.split(some), strict=True):
        sums.index_add_(0, own, part.double())
    means = (sums / counts.clamp(min=1)[:, None]).float()
    empty = (counts == 0).nonzero().squeeze(1)
    if len(empty):
        # Where many vectors are, many of these are.
        means[empty] = x[:: len(x) // len(empty)][: len(empty)]
    return prepared(means, metric)
