"""The operations once more, in float64, by definition and without regard to speed."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sixfold.packing import Bits, is_paired, n_symbols, symbol_bits, unpack
from sixfold.trellis import starts


def walsh(order: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.kron(torch.tensor([[1, 1], [1, -1]], dtype=torch.float64), matrix)
    return matrix


def rotation_matrix(turns: Tensor, factor: Tensor) -> Tensor:
    """The orthogonal matrix R [dim, dim] that `rotate` applies."""
    if len(turns) == 0:
        return factor.double()
    dim = 2 * turns.shape[-1]
    hadamard = torch.kron(walsh(dim // len(factor)), factor.double()) / math.sqrt(dim)
    matrix = torch.eye(dim, dtype=torch.float64)
    for cosine, sine in turns.double():
        turn = torch.diag(torch.cat((cosine, cosine)))
        turn = turn + torch.diag(sine, -(dim // 2)) - torch.diag(sine, dim // 2)
        matrix = hadamard @ turn @ matrix
    return matrix


def codewords(rows: Tensor, centroids: Tensor, dim: int, bits: Bits) -> Tensor:
    chosen = centroids.double()[unpack(rows, n_symbols(dim, bits), symbol_bits(bits)).long()]
    return torch.cat((chosen[..., 0], chosen[..., 1]), -1)[..., :dim] if is_paired(bits) else chosen


def path_codewords(rows: Tensor, words: Tensor, dim: int, bits: Bits) -> Tensor:
    """Codewords of paths, bit by bit as docs/format.md has it (2b)."""
    *start, count = starts(dim, bits)
    path = rows[..., None] >> torch.arange(8, dtype=torch.uint8) & 1
    return words.double()[path_states(path.flatten(-2)[..., :count], start)]


def path_states(path: Tensor, start: Sequence[int]) -> Tensor:
    """The windows of seven bits that begin at `start`, of cyclic paths with a bit an entry."""
    places = (torch.tensor(start)[:, None] + torch.arange(7)) % path.shape[-1]
    return (path[..., places].long() << torch.arange(7)).sum(-1)


def nearest_distance(u: Tensor, centroids: Tensor, bits: Bits) -> Tensor:
    """Squared distance [*b] of u to the nearest codeword of the whole vector."""
    book = centroids.double()
    if not is_paired(bits):
        return (u[..., None] - book).square().amin(-1).sum(-1)
    first, second = torch.nn.functional.pad(u, (0, u.shape[-1] % 2)).chunk(2, dim=-1)
    pairs = torch.stack((first, second), dim=-1)[..., None, :]
    return (pairs - book).square().sum(-1).amin(-1).sum(-1)


def scale(u: Tensor, q: Tensor, kind: str) -> Tensor:
    if kind == "norm":
        return torch.ones_like(u[..., 0])
    product = (u * q).sum(-1)
    return product / (q * q).sum(-1) if kind == "optimal" else (u * u).sum(-1) / product
