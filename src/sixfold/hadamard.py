"""Hadamard matrices of the orders that hidden sizes have: Paley's constructions.

A Hadamard matrix of order m·2^k is the Kronecker product of the Walsh matrix of order 2^k, which
needs no multiplication, and one of order m, made here from the squares of a finite field.
"""

import math
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

_Matrix: TypeAlias = npt.NDArray[np.int64]


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % divisor for divisor in range(2, math.isqrt(n) + 1))


def _legendre(p: int) -> _Matrix:
    """Character of GF(p): 0 for 0, 1 for squares, -1 for the rest, by element."""
    character = np.full(p, -1)
    character[np.arange(p) ** 2 % p] = 1
    character[0] = 0
    return character


def _differences(n: int) -> _Matrix:
    return np.subtract.outer(np.arange(n), np.arange(n)) % n


def _jacobsthal(q: int) -> _Matrix | None:
    """Character of x - y for all x, y of GF(q), if q is an odd prime or the square of one."""
    if q % 2 and _is_prime(q):
        return _legendre(q)[_differences(q)]
    p = math.isqrt(q)
    if p * p != q or p % 2 == 0 or not _is_prime(p):
        return None
    character = _legendre(p)
    nonsquare = int(np.flatnonzero(character == -1)[0])
    # z = a + b·sqrt(nonsquare) is a square in GF(p²) iff its norm is one in GF(p).
    a, b = np.divmod(np.arange(q), p)
    a, b = np.subtract.outer(a, a), np.subtract.outer(b, b)
    norm: _Matrix = (a * a - nonsquare * b * b) % p
    return character[norm]


def _bordered(jacobsthal: _Matrix, corner_column: int) -> _Matrix:
    conference = np.pad(jacobsthal, ((1, 0), (1, 0)), constant_values=1)
    conference[1:, 0] = corner_column
    conference[0, 0] = 0
    return conference


def _paley(order: int) -> _Matrix | None:
    """±1 matrix H with H·Hᵀ = order·I from a field of `order` - 1 or `order` / 2 - 1 elements."""
    if order % 4:
        return None
    jacobsthal = _jacobsthal(order - 1)
    if jacobsthal is not None:
        return _bordered(jacobsthal, -1) + np.eye(order, dtype=np.int64)
    if order // 2 % 4 != 2 or (jacobsthal := _jacobsthal(order // 2 - 1)) is None:
        return None
    conference = _bordered(jacobsthal, 1)
    off_diagonal = np.kron(conference, [[1, 1], [1, -1]])
    return off_diagonal + np.kron(np.eye(order // 2, dtype=np.int64), [[1, -1], [-1, -1]])


@lru_cache
def hadamard_factor(dim: int) -> npt.NDArray[np.int64] | None:
    """The factor F of order m of a Hadamard matrix of order dim = m·2^k.

    Returns:
        ±1 matrix int64[m, m], F·Fᵀ = m·I, with the least m that a construction is known for here
        (1 for powers of two), or None if there is none.

    Source: R. Paley, On orthogonal matrices, J. Math. Phys. 12 (1933).
    """
    order = dim // (dim & -dim)
    while order <= dim:
        matrix = np.ones((1, 1), dtype=np.int64) if order == 1 else _paley(order)
        if matrix is not None:
            if not np.array_equal(matrix @ matrix.T, order * np.eye(order)):
                raise AssertionError(f"not a Hadamard matrix of order {order}")
            return matrix
        order *= 2
    return None
