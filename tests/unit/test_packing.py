"""The bit order, byte by byte."""

import math

import pytest
import torch

from sixfold.errors import SixfoldError
from sixfold.packing import (
    BITS,
    check_bits,
    decode_scale,
    encode_scale,
    from_pages,
    is_paired,
    n_symbols,
    pack,
    plane_bytes,
    planes,
    row_bytes,
    symbol_bits,
    to_pages,
    unpack,
)


def test_symbols_of_integer_widths_are_coordinates_and_of_half_widths_pairs() -> None:
    assert [symbol_bits(bits) for bits in BITS] == [1, 2, 5, 3, 7, 4, 5, 6, 7, 8]
    assert [bits for bits in BITS if is_paired(bits)] == [2.5, 3.5]
    assert n_symbols(127, 3) == 127
    assert n_symbols(127, 2.5) == n_symbols(128, 2.5) == 64


@pytest.mark.parametrize("bits", [0, 9, 1.5, -1, math.nan, math.inf])
def test_unknown_width_is_refused(bits: float) -> None:
    with pytest.raises(SixfoldError, match="bits must be one of"):
        check_bits(bits)


def test_planes_are_powers_of_two_and_add_up() -> None:
    for width in range(1, 9):
        assert sum(planes(width)) == width
        assert list(planes(width)) == sorted(planes(width), reverse=True)
        assert all(plane.bit_count() == 1 for plane in planes(width))
    with pytest.raises(SixfoldError, match="symbol_bits"):
        planes(9)


def test_planes_are_whole_words() -> None:
    assert plane_bytes(128, 4) == 64
    assert plane_bytes(1, 1) == plane_bytes(32, 1) == 4
    assert plane_bytes(33, 1) == 8
    assert row_bytes(128, 3) == 32 + 16
    assert row_bytes(64, 7) == 32 + 16 + 8


def test_byte_k_holds_symbols_k_and_k_plus_stride() -> None:
    rows = pack(torch.arange(8, dtype=torch.uint8), 4)
    assert rows.tolist() == [0x40, 0x51, 0x62, 0x73]


def test_one_bit_plane_by_hand() -> None:
    indices = torch.zeros(10, dtype=torch.uint8)
    indices[[0, 4, 9]] = 1
    # Stride 4: symbol 0 is bit 0 of byte 0, symbol 4 bit 1 of byte 0, symbol 9 bit 2 of byte 1.
    assert pack(indices, 1).tolist() == [0b011, 0b100, 0, 0]


def test_high_bits_go_to_the_first_plane() -> None:
    # 5 = 0b101: high plane of two bits holds 0b10, low plane of one bit holds 1.
    assert pack(torch.tensor([5], dtype=torch.uint8), 3).tolist() == [0b10, 0, 0, 0, 1, 0, 0, 0]
    assert pack(torch.tensor([0b1101101], dtype=torch.uint8), 7).tolist() == [
        *(0b1101, 0, 0, 0),
        *(0b10, 0, 0, 0),
        *(0b1, 0, 0, 0),
    ]


def test_unused_bits_are_zero() -> None:
    rows = pack(torch.full((5,), 3, dtype=torch.uint8), 2)
    assert rows.tolist() == [0b1111, 0b11, 0b11, 0b11]


@pytest.mark.parametrize("symbol_width", [3, 4, 8])
def test_key_page_puts_four_bytes_of_sixteen_tokens_together(symbol_width: int) -> None:
    n, tokens = 24, 32
    rows = torch.randint(256, (tokens, row_bytes(n, symbol_width)), dtype=torch.uint8)
    page = to_pages(rows, n, symbol_width, "key")
    start = column = 0
    for width in planes(symbol_width):
        size = plane_bytes(n, width)
        for token in range(tokens):
            for byte in range(size):
                tile = (token // 16) * (size // 4) + byte // 4
                position = start + tile * 64 + (token % 16) * 4 + byte % 4
                assert page[position] == rows[token, column + byte]
        start, column = start + tokens * size, column + size


@pytest.mark.parametrize("symbol_width", [3, 4, 8])
def test_value_page_puts_four_tokens_together(symbol_width: int) -> None:
    n, tokens = 24, 16
    rows = torch.randint(256, (tokens, row_bytes(n, symbol_width)), dtype=torch.uint8)
    page = to_pages(rows, n, symbol_width, "value")
    start = column = 0
    for width in planes(symbol_width):
        size = plane_bytes(n, width)
        for token in range(tokens):
            for byte in range(size):
                position = start + ((token // 4) * size + byte) * 4 + token % 4
                assert page[position] == rows[token, column + byte]
        start, column = start + tokens * size, column + size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scales_keep_three_digits_from_1e_4_to_4e9(dtype: torch.dtype) -> None:
    x = torch.logspace(-4, 9.6, 500, dtype=dtype)
    decoded = decode_scale(encode_scale(x)).to(dtype)
    assert ((decoded - x).abs() <= x * 2**-11).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scales_of_any_size_keep_two_digits(dtype: torch.dtype) -> None:
    x = torch.logspace(-28.8, 29.1, 5000, dtype=dtype)
    decoded = decode_scale(encode_scale(x)).to(dtype)
    assert ((decoded - x).abs() <= x * 2**-7).all()


def test_scales_at_the_edges() -> None:
    edges = torch.tensor([0.0, 2**-97, 2**-96, 65504, 65505, 4e9, 1e30, 3e38, math.inf, math.nan])
    decoded = decode_scale(encode_scale(edges)).tolist()
    assert decoded[:4] == [0, 0, 2**-96, 65504]
    assert decoded[4] == pytest.approx(65505, rel=2**-11)
    assert decoded[5] == pytest.approx(4e9, rel=2**-11)
    assert decoded[6] == decoded[7] == 2.0**97 * (1 - 2**-7)
    assert all(math.isnan(value) for value in decoded[8:])


def test_every_stored_scale_decodes_and_encodes_to_itself() -> None:
    stored = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    decoded = decode_scale(stored)
    written = decoded.isfinite() & (decoded >= 2.0**-96) & ~(stored.abs().isinf())
    # Subnormal numbers below 2**-18 and float32s that a float16 holds better are read, not written.
    written &= ~((stored > 0) & (stored < 2.0**-18))
    bits = stored.view(torch.int16).int() & 0x7FFF
    upper = (stored < 0) & (bits < 0x3800)
    written &= ~(upper & (decoded >= 2.0**-18) & (decoded <= 65504 * 65536.0))
    written &= ~((stored < 0) & ~upper & (decoded <= 65504))
    assert written.sum() > 2**15
    assert torch.equal(encode_scale(decoded[written]), stored[written])


def test_empty_batches_keep_their_shape() -> None:
    empty = torch.empty(0, 3, 80, dtype=torch.uint8)
    rows = pack(empty, 3)
    assert rows.shape == (0, 3, row_bytes(80, 3))
    assert unpack(rows, 80, 3).shape == (0, 3, 80)
    no_pages = torch.empty(0, 64 * row_bytes(80, 3), dtype=torch.uint8)
    assert from_pages(no_pages, 80, 3, "key").shape == (0, 64, row_bytes(80, 3))
