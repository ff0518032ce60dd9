"""Packing loses nothing and mixes no two vectors."""

from typing import Literal

import torch
from hypothesis import given
from hypothesis import strategies as st

from sixfold.packing import (
    PAGE_TOKENS,
    decode_scale,
    encode_scale,
    from_pages,
    pack,
    row_bytes,
    to_pages,
    unpack,
)

widths = st.integers(1, 8)
sizes = st.integers(1, 200)
seeds = st.integers(0, 2**32)
layouts = st.sampled_from(["key", "value"])


def random_bytes(shape: tuple[int, ...], below: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(below, shape, dtype=torch.uint8, generator=generator)


@given(widths, sizes, st.lists(st.integers(0, 3), max_size=2), seeds)
def test_unpack_inverts_pack(width: int, n: int, batch: list[int], seed: int) -> None:
    indices = random_bytes((*batch, n), 2**width, seed)
    rows = pack(indices, width)
    assert rows.shape == (*batch, row_bytes(n, width))
    assert torch.equal(unpack(rows, n, width), indices)


@given(widths, sizes, seeds)
def test_vectors_are_packed_independently(width: int, n: int, seed: int) -> None:
    indices = random_bytes((3, n), 2**width, seed)
    assert torch.equal(pack(indices, width)[1], pack(indices[1], width))


@given(widths, sizes, st.integers(0, 2), layouts, seeds)
def test_pages_are_permutations(
    width: int, n: int, pages: int, layout: Literal["key", "value"], seed: int
) -> None:
    rows = random_bytes((pages, PAGE_TOKENS, row_bytes(n, width)), 256, seed)
    stored = to_pages(rows, n, width, layout)
    assert stored.shape == (pages, PAGE_TOKENS * rows.shape[-1])
    assert torch.equal(from_pages(stored, n, width, layout), rows)
    assert torch.equal(stored.sort(-1).values, rows.flatten(1).sort(-1).values)


@given(st.lists(st.floats(0, 4e9), min_size=1, max_size=20))
def test_scales_are_off_by_half_a_unit_in_the_last_place(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    error = (decode_scale(encode_scale(x)).double() - x).abs()
    assert (error <= x * 2**-11 + 2**-25).all()
    assert (error <= x * 2**-7 + 2**-96).all()


@given(st.lists(st.floats(0, 2.0**116, width=32), min_size=2, max_size=20))
def test_scales_keep_their_order(values: list[float]) -> None:
    decoded = decode_scale(encode_scale(torch.tensor(sorted(values))))
    assert (decoded.diff() >= 0).all()
