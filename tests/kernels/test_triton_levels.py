"""The instructions that look levels up in registers, without the machine they are for."""

import struct

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from sixfold.codebooks import centroids
from sixfold.kernels._triton.levels import lookup_ptx
from tests.kernels.ptx import run_ptx


def table_registers(book: torch.Tensor) -> list[int]:
    """What `magnitude_bytes` computes: high bytes 0-3 and 4-7, low bytes 0-3 and 4-7."""
    magnitudes = book[len(book) // 2 :].half().tolist()
    words = [struct.unpack("<H", struct.pack("<e", x))[0] for x in magnitudes]
    words += [0] * (8 - len(words))
    split = [word >> 8 for word in words], [word & 255 for word in words]
    return [
        int.from_bytes(bytes(part[start : start + 4]), "little")
        for part in split
        for start in (0, 4)
    ]


def levels(registers: dict[str, int]) -> list[float]:
    raw = struct.pack("<II", registers["$0"], registers["$1"])
    return list(struct.unpack("<4e", raw))


@pytest.mark.parametrize("dim", [64, 576])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_every_byte_at_every_shift(bits: int, dim: int) -> None:
    book = centroids(dim, bits)
    tables = table_registers(book)
    ptx = lookup_ptx(bits)
    first = 6 if bits == 3 else 4
    constants = {f"${first + 4 * i}": tables[i] for i in range(4)}
    width = 2 if bits == 3 else bits
    random = torch.Generator().manual_seed(bits)
    low = torch.randint(256, (64, 4), generator=random).tolist()
    for number, (shift, last_shift) in enumerate(
        (a, b) for a in range(0, 8, width) for b in (range(8) if bits == 3 else [0])
    ):
        for start in range(0, 256, 4):
            row = [(start + i + 37 * number) % 256 for i in range(4)]
            last = low[start // 4]
            inputs = {
                "$2": int.from_bytes(bytes(row), "little"),
                "$3": 0x01010101 * shift,
                "$4": int.from_bytes(bytes(last), "little"),
                "$5": 0x01010101 * last_shift,
                **constants,
            }
            symbols = [byte >> shift & (1 << width) - 1 for byte in row]
            if bits == 3:
                symbols = [s << 1 | byte >> last_shift & 1 for s, byte in zip(symbols, last)]
            expected = book[symbols].half().tolist()
            assert levels(run_ptx(ptx, inputs)) == expected
