"""What each round of the default rotation is worth: ``python -m benchmarks.rotation --json FILE``.

Mean squared error of coded vectors over rotations, as a multiple of what the codebook loses on
coordinates of a uniformly rotated vector (`expected_mse`), after one, two and three rounds.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sixfold.codebooks import centroids, expected_mse
from sixfold.eval import machine
from sixfold.kernels.decode import decode
from sixfold.kernels.encode import encode
from sixfold.packing import Bits
from sixfold.rotation import Rotation

CPU = torch.device("cpu")
ROUNDS = (1, 2, 3)


def gaussian(dim: int, random: torch.Generator) -> Tensor:
    """No structure: any rotation will do."""
    return torch.randn(dim, generator=random)


def one_hot(dim: int, random: torch.Generator) -> Tensor:
    """One coordinate, anywhere."""
    where = torch.randint(dim, (1,), generator=random)
    return torch.zeros(dim).index_fill(0, where, 1.0)


def constant(dim: int, random: torch.Generator) -> Tensor:
    """One number, of which Hadamard matrices make a one-hot vector."""
    return torch.ones(dim)


def outlier_channels(dim: int, random: torch.Generator) -> Tensor:
    """Two channels thirty times larger than the others, as keys have them."""
    x = torch.randn(dim, generator=random)
    x[:2] *= 30
    return x


def spikes(dim: int, random: torch.Generator) -> Tensor:
    """Six coordinates over noise a hundred times smaller."""
    x = 0.01 * torch.randn(dim, generator=random)
    x[torch.randperm(dim, generator=random)[:6]] = torch.randn(6, generator=random)
    return x


KINDS: tuple[Callable[[int, torch.Generator], Tensor], ...] = (
    *(gaussian, one_hot, constant, outlier_channels, spikes),
)


def relative_error(
    kind: Callable[[int, torch.Generator], Tensor], dim: int, bits: Bits, rounds: int, seeds: int
) -> tuple[float, float]:
    """Mean over rotations, and its standard error; every rotation has a vector of its own."""
    random = torch.Generator().manual_seed(0)
    book, errors = centroids(dim, bits), []
    for seed in range(seeds):
        rotation, x = Rotation(dim, seed=seed), kind(dim, random)
        tables = rotation.turns(CPU)[:rounds], rotation.factor(CPU), book
        rows, scales = encode(x, *tables, bits=bits, scale="norm")
        error = (decode(rows, scales, *tables, dim=dim, bits=bits) - x).square().sum()
        errors.append((error / x.square().sum()).item() / expected_mse(dim, bits))
    found = torch.tensor(errors, dtype=torch.float64)
    return found.mean().item(), found.std().item() / math.sqrt(seeds)


def main() -> None:
    """Measure every kind of vector; print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dims", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 4, 6])
    parser.add_argument("--seeds", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # one vector at a time
    rows = []
    for kind in KINDS:
        for dim in arguments.dims:
            for bits in arguments.bits:
                found = [relative_error(kind, dim, bits, r, arguments.seeds) for r in ROUNDS]
                means, errors = zip(*found, strict=True)
                name = kind.__name__.replace("_", " ")
                row = {"vectors": name, "dim": dim, "bits": bits}
                rows.append({**row, "error": means, "standard_error": errors})
                print(name, dim, bits, *(f"{m:.3f} ± {e:.3f}" for m, e in found), flush=True)
    if arguments.json:
        document = {"machine": machine.describe(), "seeds": arguments.seeds, "rows": rows}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
