"""An index in a file: what is written is read back, and nothing else is."""

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sixfold
from sixfold.errors import FormatError, SixfoldError
from sixfold.index import code
from sixfold.index.files import KIND
from sixfold.io import open_container, write_container

pytestmark = pytest.mark.usefixtures("unhooked")

DIM = 20
NUMBERS = [-1, 0, 1, 2, 63, 65, 2**31, 2**40, 2**62, 2**63 - 1, 2**63, 10**30, -(2**63)]
OTHERS = [None, True, False, 1.5, "1", [], [1], {}, "cosine", "l2", 1e308]
REAL = [float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1e30]


def vectors(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, DIM)).astype(np.float32)


def filled(
    bits: int = 4,
    metric: Any = "cosine",
    strings: bool = False,
    few: bool = False,
    calibrated: bool = False,
    lists: int | None = None,
) -> sixfold.Index:
    """Two segments, with holes; or so few that their mean is not settled."""
    index = sixfold.Index(DIM, bits, metric, seed=3)
    if calibrated:
        index.calibrate(vectors(500, 7) * np.geomspace(3, 0.01, DIM, dtype=np.float32))
    for start, count in ((0, 70), (70, 20)) if few else ((0, 1100), (1100, 1100)):
        ids = [f"ä{i}" for i in range(start, start + count)] if strings else None
        index.add(vectors(count, start) + np.float32(start / 100), ids)
    assert few or len(index._state.segments) == 2
    if lists is not None:
        index.partition(lists)
        more = [f"z{i}" for i in range(3)] if strings else None
        index.add(vectors(3, 8), more)
    index.remove(index.ids[5:40])
    return index


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several groups even of few coordinates."""
    monkeypatch.setattr(code, "BLOCK", 4)
    monkeypatch.setattr(code, "SCALE_BITS", 0)


@pytest.mark.filterwarnings("ignore:these vectors vary in other directions")
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("strings", [False, True])
@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
@pytest.mark.parametrize(("bits", "lists"), [(1, None), (2, 7), (3, None), (4, 7), (8, None)])
def test_what_is_written_is_read(
    bits: int,
    lists: int | None,
    metric: Any,
    strings: bool,
    few: bool,
    calibrated: bool,
    tmp_path: Path,
) -> None:
    index = filled(bits, metric, strings, few, calibrated, lists)
    assert len(index._state.code.groups) == 1 or calibrated
    index.save(tmp_path / "index")
    again = sixfold.Index.load(tmp_path / "index")
    assert (again.dim, again.bits, again.metric, again.seed) == (DIM, bits, metric, 3)
    assert again.ids.tolist() == index.ids.tolist()
    assert again.calibrated == index.calibrated
    assert index.calibrated == (calibrated and bits < 8)
    assert again.nbytes == index.nbytes
    assert again.lists == index.lists == (lists or 0)
    queries = vectors(7, 9)
    for probes in (None, 2) if lists else (None,):
        asked = queries, 10
        pairs = zip(
            again.search(*asked, probes=probes), index.search(*asked, probes=probes), strict=True
        )
        for found, expected in pairs:
            assert np.array_equal(found, expected)
    # And both go on, with segments of their own.
    more = [f"n{i}" for i in range(100)] if strings else None
    for each in (index, again):
        each.add(vectors(100, 5), more)
        each.remove(each.ids[50:120])
    assert again.ids.tolist() == index.ids.tolist()
    before = again.search(queries)
    again.save(tmp_path / "index")
    for found, expected in zip(
        sixfold.Index.load(tmp_path / "index").search(queries), before, strict=True
    ):
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("strings", [False, True])
def test_a_file_that_is_mapped(strings: bool, tmp_path: Path) -> None:
    """Found, added to and replaced as one that is read; the file stays as it is."""
    path = tmp_path / "index"
    index, queries = filled(4, "ip", strings), vectors(7, 9)
    index.save(path)
    data, expected = path.read_bytes(), index.search(queries)
    mapped, other = (sixfold.Index.load(path, mmap=True) for _ in range(2))
    assert str(path) in Path("/proc/self/maps").read_text(encoding="utf-8")
    more = [f"n{i}" for i in range(100)] if strings else None
    for each in (index, mapped):
        each.add(vectors(100, 5), more)
        each.remove(each.ids[50:120])
    assert path.read_bytes() == data
    for found, same in zip(mapped.search(queries), index.search(queries), strict=True):
        assert np.array_equal(found, same)
    mapped.save(path)
    for found, same in zip(other.search(queries), expected, strict=True):
        assert np.array_equal(found, same)
    assert sixfold.Index.load(path, mmap=True).ids.tolist() == index.ids.tolist()
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(FormatError, match="checksum"):
        sixfold.Index.load(path, mmap=True)
    with pytest.raises(SixfoldError, match="mmap"):
        sixfold.Index.load(path, mmap=1)  # type: ignore[arg-type]
    path.unlink()
    sixfold.Index(DIM).save(path)
    assert len(sixfold.Index.load(path, mmap=True)) == 0


@pytest.mark.usefixtures("small_blocks")
def test_an_index_without_vectors(tmp_path: Path) -> None:
    index = sixfold.Index(DIM)
    index.calibrate(vectors(500, 7) * np.geomspace(3, 0.01, DIM, dtype=np.float32))
    assert index.calibrated
    index.save(tmp_path / "index")
    assert sixfold.Index.load(tmp_path / "index").calibrated
    index = sixfold.Index(DIM)
    index.save(tmp_path / "index")
    assert len(sixfold.Index.load(tmp_path / "index")) == 0
    index.add(vectors(3))
    index.remove([0, 1, 2])
    index.save(tmp_path / "index")
    again = sixfold.Index.load(tmp_path / "index")
    assert again.add(vectors(1)).tolist() == [3]


def test_lists_without_vectors(tmp_path: Path) -> None:
    index = filled(lists=7)
    index.remove(index.ids)
    index.save(tmp_path / "index")
    again = sixfold.Index.load(tmp_path / "index")
    assert again.lists == 7
    ids = again.add(vectors(5))
    assert again.search(vectors(5), k=1, probes=1).ids[:, 0].tolist() == ids.tolist()


def test_files_of_others(tmp_path: Path) -> None:
    write_container(tmp_path / "other", "cache", {}, {})
    with pytest.raises(FormatError, match="expected a 'index'"):
        sixfold.Index.load(tmp_path / "other")
    with pytest.raises(FileNotFoundError):
        sixfold.Index.load(tmp_path / "missing")
    with pytest.raises(SixfoldError, match="path"):
        filled().save(5)  # type: ignore[arg-type]


def test_a_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "index"
    filled().save(path)
    data = bytearray(path.read_bytes())
    source = random.Random(0)
    for _ in range(300):
        place = source.randrange(len(data))
        bit = 1 << source.randrange(8)
        data[place] ^= bit
        path.write_bytes(data)
        with pytest.raises(FormatError):
            sixfold.Index.load(path)
        data[place] ^= bit
    for size in (0, 1, 7, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(FormatError):
            sixfold.Index.load(path)


def changed(description: dict[str, Any], tensors: dict[str, Tensor], source: random.Random) -> None:
    """Change a number of the description, or of a tensor, or a shape."""
    choice = source.random()
    if choice < 0.5:
        name = source.choice([*description])
        value = source.choice([*NUMBERS, *OTHERS])
        held = description[name]
        if isinstance(held, list) and source.random() < 0.7:
            held[source.randrange(len(held))] = value
        elif source.random() < 0.1:
            del description[name]
        else:
            description[name] = value
        return
    name = source.choice([*tensors])
    x = tensors[name].clone()
    if choice < 0.8 and x.numel():
        values = REAL if x.is_floating_point() else [n for n in NUMBERS if -(2**63) <= n < 2**63]
        value = source.choice(values)
        flat = x.view(-1)
        flat[source.randrange(len(flat))] = value % 256 if x.dtype is torch.uint8 else value
    elif choice < 0.9:
        x = x[: source.randrange(len(x))] if source.random() < 0.5 else torch.cat([x, x])
    else:
        x = x.to(source.choice([torch.float32, torch.float16, torch.int64, torch.uint8]))
    tensors[name] = x


@pytest.mark.filterwarnings("ignore:these vectors vary in other directions")
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("strings", [False, True])
@pytest.mark.parametrize("lists", [None, 7])
@pytest.mark.parametrize("count", [400, pytest.param(5000, marks=pytest.mark.slow)])
def test_a_hostile_file_is_refused_or_works(
    count: int, lists: int | None, strings: bool, few: bool, tmp_path: Path
) -> None:
    """Its digest is right, and what it says is not."""
    path = tmp_path / "index"
    filled(2, "ip", strings, few, calibrated=strings, lists=lists).save(path)
    with open_container(path, KIND) as container:
        original = container.description, container.read()
    source = random.Random(count)
    refused = 0
    for _ in range(count):
        description, tensors = copy.deepcopy(original[0]), dict(original[1])
        changed(description, tensors, source)
        try:
            write_container(path, KIND, description, tensors)
        except SixfoldError:
            continue
        try:
            index = sixfold.Index.load(path)
        except FormatError:
            refused += 1
            continue
        found = index.search(np.ones((2, index.dim)), k=3000)
        live = found.scores[0] > -np.inf
        assert np.isfinite(found.scores[0][live]).all()
        assert live.sum() == len(index) == len(set(found.ids[0][live].tolist()))
        if index.lists:
            few_lists = index.search(np.ones((2, index.dim)), k=3000, probes=2)
            assert set(few_lists.ids[0].tolist()) <= {*found.ids[0].tolist(), -1, None}
        ids = index.ids
        index.decode(ids[:50])
        index.remove(ids[:3])
        unused = "new" if ids.dtype == object else next(i for i in range(3000) if i not in index)
        index.add(np.ones((1, index.dim)), [unused])
        assert len(index) == len(ids) - 2
        index.save(path)
        assert sixfold.Index.load(path).ids.tolist() == index.ids.tolist()
    assert refused > count / 4


@pytest.mark.parametrize("dim", [1, 2, 3, 40])
@pytest.mark.parametrize("count", [300, 1500])
def test_the_largest_numbers_are_written_and_read(dim: int, count: int, tmp_path: Path) -> None:
    for metric in ("l2", "ip"):
        index = sixfold.Index(dim, metric=metric)  # type: ignore[arg-type]
        signs = np.where(np.random.default_rng(0).random((count, dim)) < 0.5, -1, 1)
        index.add(signs * (0.99e18 / dim))
        index.save(tmp_path / "index")
        assert len(sixfold.Index.load(tmp_path / "index")) == count


@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
@pytest.mark.parametrize("name", ["raw", "mean"])
def test_vectors_of_a_file_are_those_that_could_be_added(
    name: str, metric: Any, tmp_path: Path
) -> None:
    path = tmp_path / "index"
    filled(4, metric, few=True).save(path)
    with open_container(path, KIND) as container:
        description, tensors = container.description, container.read()
    tensors[f"segments.0.{name}"] *= 1e18
    write_container(path, KIND, description, tensors)
    with pytest.raises(FormatError, match=name):
        sixfold.Index.load(path)
