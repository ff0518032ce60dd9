"""Operations on the codes of one compressed layer: crop, select, fork, move."""

import gc
from typing import Any

import pytest
import torch

from sixfold.cache import CachePolicy
from sixfold.cache.pages import PagedHistory
from tests.layers import (
    Shape,
    attends_like,
    feed,
    filled,
    nbytes,
    oracle,
    padded,
    padding_mask,
)
from tests.memory import storage_bytes

# For tests of many steps, where checking shapes would take most of the time.
unhooked = pytest.mark.usefixtures("unhooked")

pytestmark = pytest.mark.usefixtures("exact_arithmetic")

NO_WINDOWS = CachePolicy(sink_tokens=0, recent_window=0)


# ---------------------------------------------------------------- crop


# 300 tokens are 192 in pages and 108 in the window.
@pytest.mark.parametrize("left", [299, 250, 193, 192, 191, 129, 128, 100, 64, 63, 5, 4, 3, 1])
def test_crop(left: int) -> None:
    layer = filled()
    keys, values = layer.dequantized()
    layer.crop(300 - left)
    assert layer.held == layer.length == left
    kept = layer.dequantized()
    assert torch.equal(kept[0], keys[:, :, :left])
    assert torch.equal(kept[1], values[:, :, :left])
    attends_like(layer, *kept, Shape().tokens(90, 1))
    keys, values = layer.dequantized()
    coded = min(left, 192)
    assert torch.equal(keys[:, :, :coded], kept[0][:, :, :coded])
    layer.crop(40)
    assert torch.equal(layer.dequantized()[1], values[:, :, : left + 50])
    attends_like(layer, *layer.dequantized(), Shape().tokens(200, 2))


@pytest.mark.parametrize("count", [300, 301, 10**9])
def test_crop_to_nothing_starts_afresh(count: int) -> None:
    shape = Shape()
    layer, fresh = filled(), shape.layer()
    layer.crop(count)
    tokens = shape.tokens(200, 5)
    assert torch.equal(feed(layer, tokens), feed(fresh, tokens))
    assert all(map(torch.equal, layer.dequantized(), fresh.dequantized()))


def test_crop_into_the_padding_of_a_row() -> None:
    layer, _ = padded([0, 70])
    layer.crop(220 - 40)
    tokens = Shape().tokens(30, 3)
    kept = layer.dequantized()
    # The second row starts over: its tokens are real from now on.
    mask = padding_mask(torch.tensor([0, 40]), 30, 70)
    layer.append(*tokens[1:])
    out = layer.attend(tokens[0], scaling=Shape().scaling, mask=mask)
    keys, values = (torch.cat(pair, 2) for pair in zip(kept, tokens[1:], strict=True))
    expected = oracle(tokens[0], keys, values, Shape().scaling, mask=mask)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


def test_crop_into_padding_before_anything_is_coded() -> None:
    layer, _ = padded([0, 70], tokens=100)
    assert layer.prefix is None
    layer.crop(60)
    query, keys, values = Shape().tokens(120, 3)
    layer.append(keys, values)
    mask = padding_mask(torch.tensor([0, 45]), 120, 160)
    layer.attend(query, scaling=Shape().scaling, mask=mask)
    assert layer.prefix is not None
    assert layer.prefix.padding.tolist() == [0, 45]


@unhooked
@pytest.mark.parametrize("left", [192, 150, 3])
def test_going_back_to_a_prefix_again_and_again_takes_no_memory(left: int) -> None:
    layer = filled()
    layer.crop(300 - left)
    kept = layer.dequantized()
    sizes = []
    for round_ in range(50):
        feed(layer, Shape().tokens(200, round_))
        sizes.append(nbytes(layer))
        layer.crop(200)
    assert len(set(sizes)) == 1
    assert all(map(torch.equal, layer.dequantized(), kept))


def test_crop_frees_what_no_table_refers_to() -> None:
    layer = filled(640, NO_WINDOWS)
    feed(layer, Shape().tokens(640))
    full = nbytes(layer)
    layer.crop(650)
    assert nbytes(layer) < 0.6 * full


# ---------------------------------------------------------------- select, repeat, reorder


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0, 1], [1], [2, 2, 2], [0, 0, 1, 1, 2, 2], [1, 0]])
def test_select(rows: list[int]) -> None:
    shape = Shape(batch=3)
    layer = filled(300, shape=shape)
    keys, values = layer.dequantized()
    layer.select(torch.tensor(rows))
    assert torch.equal(layer.dequantized()[0], keys[rows])
    assert torch.equal(layer.dequantized()[1], values[rows])
    wide = Shape(batch=len(rows))
    attends_like(layer, keys[rows], values[rows], wide.tokens(200, 1))
    layer.select(torch.tensor([len(rows) - 1]))
    attends_like(layer, *layer.dequantized(), Shape(batch=1).tokens(100, 2))


def test_copies_share_codes_until_they_differ() -> None:
    layer = filled(320, CachePolicy(recent_window=0), Shape(batch=1))
    (slab,) = (run.slab for run in layer.history.runs)
    before = nbytes(layer)
    layer.select(torch.zeros(8, dtype=torch.int64))
    assert layer.history.runs[0].slab is slab
    # Eight times the tables, sinks and maps, but not one more page.
    assert nbytes(layer) - before < 8 * 4096
    feed(layer, Shape(batch=8).tokens(64, 1))
    new = layer.history.runs[-1]
    assert new.slots[:, -1].unique().numel() == 8


def test_dropping_sequences_frees_their_pages() -> None:
    layer = filled(640, NO_WINDOWS, Shape(batch=8))
    full = nbytes(layer)
    layer.select(torch.tensor([3]))
    assert nbytes(layer) < full / 6


def test_rows_out_of_range_change_nothing() -> None:
    layer = filled()
    before = [x.clone() for x in layer.tensors()]
    with pytest.raises(IndexError):
        layer.select(torch.tensor([0, 2]))
    assert all(map(torch.equal, layer.tensors(), before))


# ---------------------------------------------------------------- fork


def test_forks_share_pages_and_diverge_alone() -> None:
    parent = filled()
    original = [x.clone() for x in parent.dequantized()]
    children = [parent.fork() for _ in range(3)]
    held = parent.tensors()
    union = storage_bytes([*held, *(x for child in children for x in child.tensors())])
    assert union == storage_bytes(held), "forking copied something"
    for child in children:
        ours, theirs = child.history.runs[0].slab, parent.history.runs[0].slab
        assert ours.pool.key_codes.data_ptr() == theirs.pool.key_codes.data_ptr()
    for seed, child in enumerate(children):
        attends_like(child, *original, Shape().tokens(150, seed))
    children[1].crop(200)
    children[2].select(torch.tensor([1, 1]))
    after = [tuple(x.clone() for x in child.dequantized()) for child in children]
    attends_like(parent, *original, Shape().tokens(500, 9))
    for child, (keys, values) in zip(children, after, strict=True):
        assert torch.equal(child.dequantized()[0], keys)
        assert torch.equal(child.dequantized()[1], values)
    parent.crop(parent.length - 192)
    assert torch.equal(parent.dequantized()[0], original[0][:, :, :192])
    assert torch.equal(children[0].dequantized()[0][:, :, :192], original[0][:, :, :192])


def test_a_fork_outlives_its_parent() -> None:
    parent = filled()
    original = parent.dequantized()
    child = parent.fork()
    del parent
    gc.collect()
    attends_like(child, *original, Shape().tokens(300, 1))


def test_compacting_leaves_the_pages_of_forks_alone() -> None:
    parent = filled(640, NO_WINDOWS, Shape(batch=4))
    original, child = parent.dequantized(), parent.fork()
    parent.select(torch.tensor([2]))
    assert parent.history.runs[0].slab is child.history.runs[0].slab, "copied what is in use"
    assert torch.equal(child.dequantized()[0], original[0])
    assert torch.equal(parent.dequantized()[0], original[0][2:3])


# ---------------------------------------------------------------- moves


def test_to_keeps_everything() -> None:
    layer, _ = padded([0, 30])
    layer.crop(10)
    before = [x.clone() for x in layer.tensors()]
    layer.to(torch.device("cpu"))
    assert all(map(torch.equal, layer.tensors(), before))


def test_a_move_that_fails_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = filled()
    before = layer.tensors()

    def failing(history: Any, device: torch.device) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(PagedHistory, "to", failing)
    with pytest.raises(torch.OutOfMemoryError):
        layer.to(torch.device("meta"))
    assert all(x is y for x, y in zip(layer.tensors(), before, strict=True))


@pytest.mark.gpu
def test_a_round_trip_over_the_gpu_loses_nothing() -> None:
    layer, _ = padded([0, 30])
    keys, values = layer.dequantized()
    layer.to(torch.device("cuda"))
    assert {x.device.type for x in layer.tensors()} == {"cuda"}
    layer.to(torch.device("cpu"))
    assert torch.equal(layer.dequantized()[0], keys)
    assert torch.equal(layer.dequantized()[1], values)
