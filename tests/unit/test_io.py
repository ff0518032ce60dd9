"""The file container: what is written is read back, and nothing else is."""

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sixfold import io
from sixfold.errors import FormatError, SixfoldError
from sixfold.io import FORMAT_VERSION, TensorSpec, open_container, write_container

# Thousands of damaged files: checking shapes would take most of the time.
pytestmark = pytest.mark.usefixtures("unhooked")

KIND = "test"
DESCRIPTION: dict[str, Any] = {"numbers": [1, 2.5, None], "text": "µ", "nested": {"a": True}}


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "codes": torch.randint(256, (3, 5), dtype=torch.uint8, generator=generator),
        "scales": torch.randn(7, generator=generator).half(),
        "brain": torch.randn(2, 3, 1, generator=generator).bfloat16(),
        "single": torch.randn(4, generator=generator),
        "double": torch.randn(2, 2, generator=generator, dtype=torch.float64),
        "counts": torch.tensor([-1, 2**40]),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(2, 0, 3),
    }


def read(path: Path, kind: str = KIND) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with open_container(path, kind) as container:
        return container.description, container.read()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "file.sixfold"
    write_container(path, KIND, DESCRIPTION, tensors())
    return path


def header_of(data: bytes) -> dict[str, Any]:
    (size,) = struct.unpack("<Q", data[:8])
    header: dict[str, Any] = json.loads(data[8 : 8 + size])
    return header


def with_header(data: bytes, header: dict[str, Any]) -> bytes:
    (size,) = struct.unpack("<Q", data[:8])
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


# ---------------------------------------------------------------- round trips


def test_round_trip(saved: Path) -> None:
    description, found = read(saved)
    assert description == DESCRIPTION
    assert found.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)


def test_views_and_shared_memory(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(4, 6)
    views = {"a": whole, "b": whole, "c": whole[1], "d": whole[:, 2], "e": whole.T}
    write_container(tmp_path / "f", KIND, {}, views)
    _, found = read(tmp_path / "f")
    assert all(torch.equal(found[name], view) for name, view in views.items())


def test_what_happens_to_the_file_later_does_not_show(saved: Path) -> None:
    _, found = read(saved)
    saved.write_bytes(b"\0" * saved.stat().st_size)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors().items())


def test_the_same_contents_give_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    shuffled = dict(reversed(tensors().items()))
    write_container(tmp_path / "again", KIND, dict(reversed(DESCRIPTION.items())), shuffled)
    ours, theirs = header_of(saved.read_bytes()), header_of((tmp_path / "again").read_bytes())
    assert ours["__metadata__"] == theirs["__metadata__"]


def test_an_existing_file_is_replaced_and_keeps_no_company(saved: Path) -> None:
    write_container(saved, KIND, {"new": 1}, {})
    assert read(saved) == ({"new": 1}, {})
    assert list(saved.parent.iterdir()) == [saved]


def test_files_are_readable_by_whom_the_umask_says(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    assert saved.stat().st_mode == (tmp_path / "plain").stat().st_mode


# ---------------------------------------------------------------- writing that fails


@pytest.mark.parametrize("kind", [OSError, SafetensorError])
def test_a_failed_save_leaves_the_old_file(
    kind: type[Exception], saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def failing(tensors: Any, filename: Any, metadata: Any) -> None:
        Path(filename).write_bytes(b"half a file")
        raise kind("no space left on device")

    monkeypatch.setattr(io, "save_file", failing)
    with pytest.raises(OSError, match="no space left"):
        write_container(saved, KIND, {}, tensors())
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_description_that_is_no_json_writes_nothing(saved: Path) -> None:
    before = saved.read_bytes()
    for description in ({"x": float("nan")}, {"x": object()}):
        with pytest.raises((ValueError, TypeError)):
            write_container(saved, KIND, description, {})
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_missing_folder_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_container(tmp_path / "no" / "file", KIND, {}, tensors())


# ---------------------------------------------------------------- reading what is no such file


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(FileNotFoundError, match=path.name):
            read(path)


@pytest.mark.parametrize(
    "contents",
    [
        b"",
        b"short",
        pickle.dumps({"a": 1}),
        b"\xff" * 64,
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 2**62) + b"{}",
        b"<!DOCTYPE html><html>" * 10,
    ],
    ids=["empty", "short", "pickle", "ones", "no metadata", "huge header", "html"],
)
def test_foreign_bytes(contents: bytes, tmp_path: Path) -> None:
    (tmp_path / "foreign").write_bytes(contents)
    with pytest.raises(FormatError, match="foreign"):
        read(tmp_path / "foreign")


def test_torch_save_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save(tensors(), tmp_path / "foreign")
    with pytest.raises(FormatError, match="not a Sixfold file"):
        read(tmp_path / "foreign")


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {"format": "sixfold"}])
def test_someone_elses_safetensors(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "foreign", metadata)
    with pytest.raises(FormatError, match="not one written by Sixfold"):
        read(tmp_path / "foreign")


def test_another_kind(saved: Path) -> None:
    with pytest.raises(FormatError, match="holds a 'test', expected a 'index'"):
        read(saved, "index")


@pytest.mark.parametrize("version", [str(FORMAT_VERSION + 1), "0", "1.1", "", "x"])
def test_another_version(version: str, saved: Path) -> None:
    data = saved.read_bytes()
    header = header_of(data)
    header["__metadata__"]["version"] = version
    saved.write_bytes(with_header(data, header))
    with pytest.raises(FormatError, match=r"format version .* upgrade Sixfold"):
        read(saved)


@pytest.mark.parametrize("description", ["", "[]", "1", "{", "nan", "[" * 100_000, "9" * 5000])
def test_a_description_that_is_no_object(description: str, saved: Path) -> None:
    data = saved.read_bytes()
    header = header_of(data)
    header["__metadata__"]["description"] = description
    saved.write_bytes(with_header(data, header))
    with pytest.raises(FormatError, match="damaged"):
        read(saved)


def test_truncation_at_every_length(saved: Path) -> None:
    data = saved.read_bytes()
    for length in range(len(data)):
        saved.write_bytes(data[:length])
        with pytest.raises(SixfoldError):
            read(saved)
    saved.write_bytes(data + b"\0")
    with pytest.raises(SixfoldError):
        read(saved)


def test_every_single_bit_flip(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_container(path, KIND, {"a": 1}, {"x": torch.arange(3, dtype=torch.uint8)})
    data = path.read_bytes()
    for position in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(SixfoldError):
            read(path)


# ---------------------------------------------------------------- validation before allocation


def test_expect_compares_everything(saved: Path) -> None:
    specs = {
        name: TensorSpec(tuple(x.shape), io.DTYPE_NAMES[x.dtype]) for name, x in tensors().items()
    }
    wrong = {
        "missing": {k: v for k, v in specs.items() if k != "codes"},
        "unknown": specs | {"more": TensorSpec((1,), "U8")},
        "shape": specs | {"codes": TensorSpec((5, 3), "U8")},
        "dtype": specs | {"codes": TensorSpec((3, 5), "I64")},
    }
    with open_container(saved, KIND) as container:
        container.expect(specs)
        for expected in wrong.values():
            with pytest.raises(FormatError, match=r"codes|more"):
                container.expect(expected)


def test_opening_and_expecting_reads_no_tensor(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_container(saved, KIND) as container:
        handle = container._handle
        monkeypatch.setattr(container, "_handle", None)
        container.expect(container.specs)
        monkeypatch.setattr(container, "_handle", handle)
        assert container.read().keys() == container.specs.keys()
