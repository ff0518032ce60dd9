"""The kinds of vectors that compression schemes stumble over, and their true distortion."""

from collections.abc import Callable

import torch
from torch import Tensor


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(n: int, dim: int, seed: int) -> Tensor:
    return torch.randn(n, dim, generator=generator(seed))


def spiky(n: int, dim: int, seed: int) -> Tensor:
    """Six large coordinates, elsewhere in every vector, over noise a hundred times smaller."""
    random = generator(seed)
    x = 0.01 * torch.randn(n, dim, generator=random)
    where = torch.rand(n, dim, generator=random).argsort(-1)[:, :6]
    return x.scatter(-1, where, torch.randn(n, 6, generator=random))


def outlier_channels(n: int, dim: int, seed: int) -> Tensor:
    """The same few channels are large in every vector, as in attention keys."""
    x = gaussian(n, dim, seed)
    x[:, :: -(-dim // 4)] *= 30
    return x


def constant(n: int, dim: int, seed: int) -> Tensor:
    return gaussian(n, 1, seed).expand(n, dim).clone()


def one_hot(n: int, dim: int, seed: int) -> Tensor:
    where = torch.randint(dim, (n,), generator=generator(seed))
    return torch.nn.functional.one_hot(where, dim).float()


KINDS: dict[str, Callable[[int, int, int], Tensor]] = {
    "gaussian": gaussian,
    "spiky": spiky,
    "outlier_channels": outlier_channels,
}
LATTICE_KINDS: dict[str, Callable[[int, int, int], Tensor]] = {
    "constant": constant,
    "one_hot": one_hot,
}


def normalized_error(x: Tensor, decoded: Tensor) -> Tensor:
    """‖x - x̂‖² / ‖x‖² of every vector, in float64."""
    x, decoded = x.double(), decoded.double()
    return (x - decoded).square().sum(-1) / x.square().sum(-1)
