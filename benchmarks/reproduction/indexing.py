"""Table 2: seconds to turn 100,000 vectors into codes of 4 bits."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import torch_threads
from benchmarks.reproduction import faiss_peer
from sixfold.eval.timing import Case, Contender, measure, time_once
from sixfold.quantizers import TurboQuantMSE, TurboQuantProd

DIMS = (200, 1536, 3072)
VECTORS = 100_000
# Slow contenders get a share of the vectors; their seconds are multiplied.
SHARE = 10
BITS = 4
REPEATS = 3
# Subspaces of a product quantizer are alike and independent: two are timed, and multiplied.
SUBSPACES = 2

# Seconds at 200, 1,536 and 3,072 dimensions.
PUBLISHED = {
    "paper: PQ": (37.04, 239.75, 494.42),
    "paper: RaBitQ, one CPU core": (597.25, 2267.59, 3957.19),
    "paper: TurboQuant, A100": (0.0007, 0.0013, 0.0021),
    "Gao et al.: TurboQuant, A100": (0.011, 0.114, 0.276),
    "Gao et al.: RaBitQ, A100": (0.009, 0.065, 0.152),
    "Gao et al.: RaBitQ, CPU": (0.125, 1.003, 4.176),
}

Encode = Callable[[Tensor], object]


@dataclass(frozen=True, slots=True)
class Encoder:
    """What encodes, made for a dimension, and what share of the vectors it is given."""

    name: str
    make: Callable[[int], Encode]
    share: int = 1


def indexing(vectors: int = VECTORS, threads: tuple[int, ...] = (1, 2)) -> dict[str, Any]:
    """Seconds of every contender at every dimension, beside those published."""
    rows: list[dict[str, Any]] = [
        {"name": name, "threads": None, "seconds": dict(zip(map(str, DIMS), seconds, strict=True))}
        for name, seconds in PUBLISHED.items()
    ]
    seconds: dict[tuple[str, int], dict[str, float]] = {
        (one.name, count): {} for one in _encoders() for count in threads
    }
    for dim in DIMS:
        x = torch.randn(vectors, dim, generator=torch.Generator().manual_seed(dim))
        for count in threads:
            for name, value in _time_all(x, count).items():
                seconds[name, count][str(dim)] = value
    for (name, count), found in seconds.items():
        rows.append({"name": name, "threads": count, "seconds": found})
    rows += _product_rows(vectors, threads)
    return {"vectors": vectors, "bits": BITS, "share": SHARE, "rows": rows}


def _encoders() -> list[Encoder]:
    ours = [
        Encoder("Sixfold, norms", lambda dim: TurboQuantMSE(dim, BITS, scale="norm").encode),
        Encoder("Sixfold, unbiased", lambda dim: TurboQuantMSE(dim, BITS, "unbiased").encode),
        Encoder(
            "Sixfold, dense rotation",
            lambda dim: TurboQuantMSE(dim, BITS, "norm", rotation="orthogonal").encode,
            SHARE,
        ),
        Encoder("Sixfold, prod", lambda dim: TurboQuantProd(dim, BITS).encode, SHARE),
    ]
    names = faiss_peer.indexes(DIMS[0], BITS, trained=False)
    return ours + [Encoder(name, _adder(name), SHARE) for name in names]


def _adder(name: str) -> Callable[[int], Encode]:
    def make(dim: int) -> Encode:
        def encode(x: Tensor) -> None:
            index = faiss_peer.indexes(dim, BITS, trained=False)[name]()
            index.train(x.numpy())
            index.add(x.numpy())

        return encode

    return make


def _time_all(x: Tensor, threads: int) -> dict[str, float]:
    """Median seconds for all of `x` with tables made, of every contender."""
    found = {}
    faiss_peer.use_threads(threads)
    with torch_threads(threads):
        for one in _encoders():
            encode, part = one.make(x.shape[1]), x[: len(x) // one.share]
            encode(part[:64])
            repeats = REPEATS if one.share == 1 else 1
            case = Case([Contender(one.name, partial(encode, part))])
            (row,) = measure(case, repeats=repeats, warmup=0)
            found[one.name] = one.share * row.seconds.median
    return found


def _product_rows(vectors: int, threads: tuple[int, ...]) -> list[dict[str, Any]]:
    """A product quantizer's k-means (faiss's defaults) and codes, from a few subspaces."""
    if faiss_peer.FAISS is None:
        return []
    coordinates = SUBSPACES * 8 // BITS
    x = torch.randn(vectors, coordinates, generator=torch.Generator().manual_seed(0)).numpy()
    rows = []
    for count in threads:
        faiss_peer.use_threads(count)
        index = faiss_peer.FAISS.IndexPQ(coordinates, SUBSPACES, 8)
        parts = {"k-means": partial(index.train, x), "codes": partial(index.add, x)}
        for name, call in parts.items():
            seconds = time_once(call)
            scaled = {str(dim): seconds * dim / coordinates for dim in DIMS}
            rows.append({"name": f"faiss PQ, {name}", "threads": count, "seconds": scaled})
    return rows
