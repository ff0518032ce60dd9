"""The instructions that look levels up in registers, without the machine they are for."""

import struct

import pytest
import torch

pytest.importorskip("sixfold.kernels._triton", exc_type=ImportError)

from sixfold.codebooks import centroids
from sixfold.kernels._triton.levels import lookup_ptx
from tests.kernels.ptx import run_ptx


def table_registers(bits: int, book: torch.Tensor) -> list[int]:
    """What the kernel's `table_registers` computes."""
    levels = (book[8:] if bits == 4 else book).half().tolist()
    words = [struct.unpack("<H", struct.pack("<e", x))[0] for x in levels]
    words += [0] * (8 - len(words))
    low, high = bytes(word & 255 for word in words), bytes(word >> 8 for word in words)
    return [int.from_bytes(part, "little") for part in (low[:4], low[4:], high[:4], high[4:])]


def word(values: list[int]) -> int:
    return int.from_bytes(bytes(values), "little")


def halves(*registers: int) -> list[float]:
    return list(struct.unpack("<4e", struct.pack("<II", *registers)))


def shuffled(seed: int) -> list[list[int]]:
    """All bytes, four by four, in a random order."""
    random = torch.Generator().manual_seed(seed)
    return torch.randperm(256, generator=random).view(64, 4).tolist()


@pytest.mark.parametrize("dim", [64, 576])
@pytest.mark.parametrize(("bits", "slices"), [(1, 8), (2, 4)])
def test_one_and_two_bits(bits: int, slices: int, dim: int) -> None:
    book = centroids(dim, bits)
    tables = {f"${3 + 4 * i}": x for i, x in enumerate(table_registers(bits, book))}
    for number in range(slices):
        for row in shuffled(number):
            found = run_ptx(lookup_ptx(bits, number), {"$2": word(row), **tables})
            symbols = [byte >> bits * number & (1 << bits) - 1 for byte in row]
            assert halves(found["$0"], found["$1"]) == book[symbols].half().tolist()


@pytest.mark.parametrize("place", range(8))
def test_three_bits(place: int) -> None:
    book = centroids(128, 3)
    tables = {f"${5 + 4 * i}": x for i, x in enumerate(table_registers(3, book))}
    for number in range(4):
        for row, last in zip(shuffled(number), shuffled(number + 9), strict=True):
            # Columns of one register may have their last bit in different places.
            places = [place, 7 - place, (place + 3) % 8, 0]
            bits = {"$3": word(last), "$4": word([1 << p for p in places])}
            found = run_ptx(lookup_ptx(3, number), {"$2": word(row), **bits, **tables})
            symbols = [
                (byte >> 2 * number & 3) << 1 | more >> p & 1
                for byte, more, p in zip(row, last, places, strict=True)
            ]
            assert halves(found["$0"], found["$1"]) == book[symbols].half().tolist()


@pytest.mark.parametrize("dim", [20, 64, 576])
def test_four_bits(dim: int) -> None:
    book = centroids(dim, 4)
    tables = {f"${5 + 4 * i}": x for i, x in enumerate(table_registers(4, book))}
    for seed in range(8):
        for row in shuffled(seed):
            found = run_ptx(lookup_ptx(4, 0), {"$4": word(row), **tables})
            low, high = [byte & 15 for byte in row], [byte >> 4 for byte in row]
            assert halves(found["$0"], found["$1"]) == book[low].half().tolist()
            assert halves(found["$2"], found["$3"]) == book[high].half().tolist()
