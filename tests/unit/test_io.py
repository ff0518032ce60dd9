"""The file container: what is written is read back, and nothing else is."""

import errno
import itertools
import json
import os
import pickle
import stat
import struct
import threading
from pathlib import Path
from typing import Any
from unittest.mock import Mock

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


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_a_file_that_is_replaced_hands_on_its_mode(mode: int, saved: Path) -> None:
    saved.chmod(mode)
    write_container(saved, KIND, {"new": 1}, tensors())
    assert stat.S_IMODE(saved.stat().st_mode) == mode
    assert read(saved)[0] == {"new": 1}


def test_what_replaces_a_secret_is_one_all_along(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved.chmod(0o600)
    written = io.save_file
    modes = []

    def spying(tensors: Any, filename: Any, metadata: Any) -> None:
        written(tensors, filename, metadata)
        modes.append(stat.S_IMODE(Path(filename).stat().st_mode))

    monkeypatch.setattr(io, "save_file", spying)
    write_container(saved, KIND, {}, tensors())
    assert modes == [0o600]


def test_a_link_is_followed(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    link, dangling = folder / "link", folder / "dangling"
    link.symlink_to(saved)
    dangling.symlink_to("later")
    for path in (link, dangling):
        write_container(path, KIND, {"new": 1}, {})
        assert path.is_symlink()
        assert read(path) == ({"new": 1}, {})
    assert read(saved)[0] == read(folder / "later")[0] == {"new": 1}
    assert {path.name for path in folder.iterdir()} == {"link", "dangling", "later"}


def test_a_file_that_is_replaced_hands_on_its_attributes(saved: Path) -> None:
    """Access lists are such, but not every file system has any."""
    try:
        os.setxattr(saved, "user.sixfold", b"kept")
    except (OSError, AttributeError):
        pytest.skip("no extended attributes here")
    write_container(saved, KIND, {"new": 1}, tensors())
    assert os.getxattr(saved, "user.sixfold") == b"kept"


@pytest.mark.parametrize("length", [200, 237, 238, 255])
def test_names_as_long_as_names_can_be(length: int, tmp_path: Path) -> None:
    path = tmp_path / ("n" * length)
    for number in (1, 2):
        write_container(path, KIND, {"number": number}, tensors())
        assert read(path)[0] == {"number": number}


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


def test_a_failed_save_names_the_file_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that is written first has a name of its own."""

    def closed(path: Path, mode: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", closed)
    with pytest.raises(PermissionError) as caught:
        write_container(tmp_path / "cache.sixfold", KIND, {}, tensors())
    assert caught.value.filename == str(tmp_path / "cache.sixfold")


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


def test_what_cannot_be_written_is_called_by_its_name(tmp_path: Path) -> None:
    for path, kind, name in (
        (tmp_path / "absent" / "file", FileNotFoundError, str(tmp_path / "absent")),
        (f"{tmp_path}/absent/", IsADirectoryError, f"{tmp_path}/absent/"),
    ):
        with pytest.raises(kind) as error:
            write_container(path, "kind", {}, {"x": torch.ones(2)})
        assert error.value.filename == name
    for path in ("", "a\0b"):
        with pytest.raises(SixfoldError, match="path must name a file"):
            write_container(path, "kind", {}, {"x": torch.ones(2)})
    assert not [*tmp_path.iterdir()]


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file.*nothing"):
        read(tmp_path / "nothing")


def test_a_folder_is_called_one(saved: Path) -> None:
    for act in (read, lambda path: write_container(path, KIND, {}, {})):
        with pytest.raises(IsADirectoryError, match=f"is a directory.*{saved.parent.name}"):
            act(saved.parent)
    assert list(saved.parent.iterdir()) == [saved]


def test_pipes_and_devices_are_neither_read_nor_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/null")):
        # Without anyone at its other end, a pipe would be waited for.
        with pytest.raises(OSError, match="is a pipe, socket or device"):
            read(path)
    with pytest.raises(OSError, match="is a pipe, socket or device"):
        write_container(pipe, KIND, {}, {})
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert list(tmp_path.iterdir()) == [pipe]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's descriptors")
def test_what_is_open_and_has_no_name_is_not_replaced(tmp_path: Path) -> None:
    """Such links say a name of old, by which the file would be written beside it."""
    unnamed = os.open(tmp_path / "gone", os.O_RDWR | os.O_CREAT)
    (tmp_path / "gone").unlink()
    pipe = os.pipe()
    for descriptor in (unnamed, pipe[1]):
        with pytest.raises(OSError, match="by their name") as error:
            write_container(f"/proc/self/fd/{descriptor}", KIND, {}, {"x": torch.ones(2)})
        assert error.value.filename == f"/proc/self/fd/{descriptor}"
    for descriptor in (unnamed, *pipe):
        os.close(descriptor)
    assert not [*tmp_path.iterdir()]


def test_a_file_that_may_not_be_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved.chmod(0)
    if os.access(saved, os.R_OK):  # a privileged user may read anything
        error = PermissionError(errno.EACCES, "Permission denied", str(saved))
        monkeypatch.setattr(os, "open", Mock(side_effect=error))
        monkeypatch.setattr(io, "safe_open", Mock(side_effect=error), raising=False)
    with pytest.raises(PermissionError, match=saved.name):
        read(saved)


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


@pytest.mark.parametrize(
    "description",
    ["", "[]", "1", "{", "nan", '{"x": NaN}', '{"x": -Infinity}', "[" * 100_000, "9" * 5000],
)
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


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_container(path, KIND, {}, {"x": torch.arange(100_000), "y": torch.arange(100_000)})
    with open_container(path, KIND) as container:
        os.truncate(path, path.stat().st_size // 3)
        with pytest.raises(FormatError, match="cut short"):
            container.read()


def test_a_file_that_is_replaced_while_it_is_read(saved: Path) -> None:
    with open_container(saved, KIND) as container:
        write_container(saved, KIND, {"new": 1}, {"new": torch.ones(1000)})
        assert all(torch.equal(container.read()[name], x) for name, x in tensors().items())


def test_reading_beside_someone_who_saves(tmp_path: Path) -> None:
    """Whatever is read is one of the files that were written, whole."""
    path, sizes = tmp_path / "file", (3, 1000)
    for size in sizes:
        write_container(tmp_path / str(size), KIND, {"size": size}, {"x": torch.full((size,), 1.5)})
    stop = threading.Event()

    def save() -> None:
        for size in itertools.cycle(sizes):
            # What `write_container` ends with, as often as can be.
            os.link(tmp_path / str(size), tmp_path / "next")
            os.replace(tmp_path / "next", path)  # noqa: PTH105
            if stop.is_set():
                return

    write_container(path, KIND, {"size": 0}, {"x": torch.zeros(0)})
    writer = threading.Thread(target=save)
    writer.start()
    try:
        for _ in range(3000):
            description, found = read(path)
            assert found["x"].tolist() == [1.5] * description["size"]
    finally:
        stop.set()
        writer.join()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"shape": [5, 3], "dtype": "I32"}, "dtype"),
        ({"shape": [2**62, 4], "data_offsets": [0, 0]}, "shape"),
        ({"shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}, "shape"),
        ({"shape": [-3, -5]}, "shape"),
        ({"shape": [15.0]}, "shape"),
        ({"shape": [True, 15]}, "shape"),
        ({"data_offsets": [15, 0]}, "lies at"),
        ({"data_offsets": [0, 15, 15]}, "offsets"),
        ({"data_offsets": [10**30, 10**30 + 15]}, "lies at"),
        ({"more": 1}, "has no dtype"),
    ],
)
def test_a_tensor_that_lies_nowhere(change: dict[str, Any], reason: str, saved: Path) -> None:
    write_container(saved, KIND, {}, {"codes": tensors()["codes"]})
    data = saved.read_bytes()
    header = header_of(data)
    header["codes"] |= change
    saved.write_bytes(with_header(data, header))
    with pytest.raises(FormatError, match=rf"not a Sixfold file.*{reason}"):
        read(saved)


def test_a_name_that_occurs_twice(saved: Path) -> None:
    write_container(saved, KIND, {}, {"codes": tensors()["codes"]})
    data = saved.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    entry = json.dumps(header_of(data)["codes"]).encode()
    text = data[8 : 8 + size].rstrip()[:-1] + b',"codes":' + entry + b"}"
    saved.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    with pytest.raises(FormatError, match="twice"):
        read(saved)


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
