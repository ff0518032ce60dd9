"""What each choice of the trellis is worth: ``python -m benchmarks.trellis_choices --json FILE``.

Squared error of Gaussian vectors at 256 states with the codebook, or the seam, changed.
``--search`` instead ranks the multipliers that a codebook could have.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from sixfold.eval import machine
from sixfold.kernels.trellis import reference
from sixfold.packing import Bits
from sixfold.rotation import Rotation
from sixfold.trellis import codewords, quantile_codebook

CPU = torch.device("cpu")
STATES = 256
WIDTHS: tuple[Bits, ...] = (1, 2, 3, 4)
SHIPPED = "shipped"


def _random(bits: Bits) -> Tensor:
    """Normal numbers in any order."""
    return torch.randn(STATES, generator=torch.Generator().manual_seed(0))


def _shuffled(bits: Bits) -> Tensor:
    """The shipped codewords in any order."""
    order = torch.randperm(STATES, generator=torch.Generator().manual_seed(0))
    return codewords(STATES, bits)[order]


def _plain(bits: Bits) -> Tensor:
    """The shipped codebook with the variance of a coordinate."""
    book = codewords(STATES, bits)
    return book / book.max() * quantile_codebook(STATES, 1, 1.0).max()


CODEBOOKS: dict[str, Callable[[Bits], Tensor]] = {
    SHIPPED: lambda bits: codewords(STATES, bits),
    "spread 1": _plain,
    "its codewords in random order": _shuffled,
    "random normal codewords": _random,
}
SEAMS = {"2 windows at the seam": 2, "4 windows at the seam": 4, "16 windows at the seam": 16}


@contextmanager
def seam(count: int) -> Iterator[None]:
    """Let the search look at `count` windows on either side of the seam."""
    usual = reference._SEAM_WINDOWS
    try:
        reference._SEAM_WINDOWS = count
        yield
    finally:
        reference._SEAM_WINDOWS = usual


def error(book: Tensor, bits: Bits, dim: int, vectors: int) -> float:
    """‖x - x̂‖² / ‖x‖² with the optimal scale."""
    x = torch.randn(vectors, dim, generator=torch.Generator().manual_seed(1))
    tables = Rotation(dim).turns(CPU), Rotation(dim).factor(CPU), book
    rows, scales = reference.encode(x, *tables, bits=bits, scale="optimal")
    lost = reference.decode(rows, scales, *tables, dim=dim, bits=bits) - x
    return float((lost.square().sum(1) / x.square().sum(1)).mean())


def search(states: int, bits: Bits, spread: float, dim: int, vectors: int) -> None:
    """Print the best multipliers; m and 2·states - m are the same code, mirrored."""
    found = [
        (error(quantile_codebook(states, multiplier, spread), bits, dim, vectors), multiplier)
        for multiplier in range(1, states, 2)
    ]
    for lost, multiplier in sorted(found)[:8]:
        print(f"{states} states, {bits:g} bits, multiplier {multiplier}: {lost:.5f}")


def main() -> None:
    """Measure every variant, or rank multipliers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--vectors", type=int, default=2048)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--search", type=float, metavar="BITS")
    parser.add_argument("--states", type=int, default=STATES, help="of --search")
    parser.add_argument("--spread", type=float, default=1.05, help="of --search")
    arguments = parser.parse_args()
    dim, vectors = arguments.dim, arguments.vectors
    if arguments.search:
        search(arguments.states, arguments.search, arguments.spread, dim, vectors)
        return
    errors = {
        name: {f"{b:g}": error(make(b), b, dim, vectors) for b in WIDTHS}
        for name, make in CODEBOOKS.items()
    }
    for name, count in SEAMS.items():
        with seam(count):
            make = CODEBOOKS[SHIPPED]
            errors[name] = {f"{b:g}": error(make(b), b, dim, vectors) for b in WIDTHS}
    rows = [{"variant": name, "error": found} for name, found in errors.items()]
    for row in rows:
        print(row)
    if arguments.json:
        document = {"machine": machine.describe(), "dim": dim, "vectors": vectors, "rows": rows}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
