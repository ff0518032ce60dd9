"""The file container: safetensors with a description and a digest (docs/format.md).

Nothing is unpickled, and nothing is allocated before the header has been checked.
"""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sixfold.arguments import dense, shown
from sixfold.arguments import path as checked_path
from sixfold.container.files import (
    existing,
    hand_on_attributes,
    hand_on_owner,
    open_regular,
    place_of,
)
from sixfold.container.header import DTYPE_NAMES, DTYPES, Header, TensorSpec, read_header
from sixfold.errors import FormatError, SixfoldError

__all__ = [
    "DTYPE_NAMES",
    "FORMAT_VERSION",
    "Container",
    "TensorSpec",
    "open_container",
    "write_container",
]

FORMAT_VERSION = 2
_READ_VERSIONS = ("1", "2")
_MAGIC = "sixfold"


def write_container(
    path: str | os.PathLike[str],
    kind: str,
    description: Mapping[str, Any],
    tensors: dict[str, Tensor],
) -> None:
    """Write a file in one step: at every moment `path` is the old file or the new one, whole.

    A link is followed, and a file that is replaced hands on its mode and, where the system lets it,
    its owner and group. A new one gets the mode that the umask says.

    Args:
        path: Where to.
        kind: What the file holds, such as "cache".
        description: JSON values that describe the tensors.
        tensors: What to store.

    Raises:
        SixfoldError: An argument cannot be stored.
        OSError: The file cannot be written, or is no regular file; an older one is still whole.
    """
    path, tensors = checked_path(path), _separate(tensors)
    try:
        text = json.dumps(description, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise SixfoldError(f"description must be of finite JSON values: {error}") from error
    if not isinstance(kind, str):
        raise SixfoldError(f"kind must be a string, got {shown(kind)}")
    metadata = {
        "format": _MAGIC,
        "version": str(FORMAT_VERSION),
        "kind": kind,
        "description": text,
        "sha256": _digest(kind, text, tensors),
    }
    target = place_of(path)
    if os.fsdecode(path).endswith(os.sep):
        raise IsADirectoryError(errno.EISDIR, "expected a file's path, got a folder's", str(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "the folder does not exist", str(target.parent))
    replaced = existing(target, path)
    # Not made of the target's name, which may be as long as a name can be.
    temporary = target.with_name(f".sixfold-{secrets.token_hex(8)}")
    try:
        # Created here first: a folder that is missing or closed is an OSError, and the mode is
        # what the umask says, where `save_file` makes files that only their owner can read.
        with temporary.open("xb") as file:
            mode = os.fstat(file.fileno()).st_mode
        save_file(tensors, temporary, metadata)
        if replaced is not None:
            hand_on_owner(replaced, temporary)
        if replaced is not None:
            hand_on_attributes(target, temporary)
        temporary.chmod(stat.S_IMODE(mode if replaced is None else replaced.st_mode))
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    except SafetensorError as error:
        raise OSError(f"cannot write {target}: {error}") from error
    except OSError as error:
        # Of the file that was asked for, not of the one beside it.
        if error.filename == str(temporary):
            error.filename = str(target)
        raise
    finally:
        temporary.unlink(missing_ok=True)


class Container:
    """A file that has passed the checks of its header; tensors are read on demand."""

    def __init__(self, path: Path, file: BufferedReader, header: Header, kind: str) -> None:
        self._path = path
        self._handle = file
        self._mapped: np.ndarray | None = None
        self._body = header.body
        self._metadata = _checked_metadata(path, header.metadata, kind)
        self.description: dict[str, Any] = _parsed(path, self._metadata["description"])
        self.specs = header.specs()

    def expect(self, expected: Mapping[str, TensorSpec]) -> None:
        """Compare what is stored with what its description promises.

        Raises:
            FormatError: A tensor is missing, unknown, or of another shape or dtype.
        """
        if self.specs.keys() != expected.keys():
            missing = sorted(expected.keys() - self.specs.keys())[:3]
            unknown = sorted(self.specs.keys() - expected.keys())[:3]
            raise FormatError(f"{self._path}: missing tensors {missing}, unknown {unknown}.")
        for name, spec in expected.items():
            if self.specs[name] != spec:
                raise FormatError(f"{self._path}: {name} is {self.specs[name]}, expected {spec}.")

    def read(self, mapped: Callable[[str], bool] = lambda _: False) -> dict[str, Tensor]:
        """All tensors, on the CPU.

        Args:
            mapped: Names of tensors that are not read but mapped, private to this process once it
                writes to them: nobody may cut the file while they are in use.

        Raises:
            FormatError: The bytes are not the ones that were written.
        """
        self._handle.seek(self._body)
        tensors = {
            name: (self._map if mapped(name) and spec.nbytes else self._read)(name, spec)
            for name, spec in self.specs.items()
        }
        digest = _digest(self._metadata["kind"], self._metadata["description"], tensors)
        if digest != self._metadata["sha256"]:
            raise FormatError(f"{self._path} is damaged: its contents do not match its checksum.")
        return tensors

    def _map(self, name: str, spec: TensorSpec) -> Tensor:
        start = self._handle.tell()
        if self._mapped is None:
            # One for all tensors: each takes a file descriptor. The size was compared with the
            # header's when the file was opened.
            self._mapped = np.memmap(self._handle, np.uint8, "c")
        stop = self._handle.seek(start + spec.nbytes)
        memory = torch.from_numpy(self._mapped[start:stop])
        return memory.view(DTYPES[spec.dtype]).view(spec.shape)

    def _read(self, name: str, spec: TensorSpec) -> Tensor:
        tensor = torch.empty(spec.shape, dtype=DTYPES[spec.dtype], device="cpu")
        # Read, not mapped: of a file that is cut meanwhile the mapped rest would kill the process.
        if self._handle.readinto(_bytes(tensor)) < spec.nbytes:
            raise FormatError(f"{self._path} was cut short while it was read: {name} is not whole.")
        return tensor


@contextlib.contextmanager
def open_container(path: str | os.PathLike[str], kind: str) -> Iterator[Container]:
    """Open a file written by `write_container`.

    The file is opened once: one that takes its place meanwhile is not seen.

    Raises:
        SixfoldError: `path` is no path.
        FormatError: Not such a file, of another kind or a newer version, cut short or damaged.
        OSError: The file cannot be read, or is no regular file.
    """
    source = Path(checked_path(path))
    with os.fdopen(open_regular(source), "rb") as file:
        try:
            header = read_header(file, os.fstat(file.fileno()).st_size)
            container = Container(source, file, header, kind)
        except FormatError:
            raise
        except ValueError as error:
            raise FormatError(
                f"{source} is not a Sixfold file, or it is damaged or cut short ({error}). "
                f"Expected a safetensors container written by Sixfold."
            ) from error
        yield container


def _checked_metadata(path: Path, metadata: dict[str, str], kind: str) -> dict[str, str]:
    wanted = {"format", "version", "kind", "description", "sha256"}
    if metadata.get("format") != _MAGIC or not wanted <= metadata.keys():
        raise FormatError(f"{path} is a safetensors file, but not one written by Sixfold.")
    if metadata["version"] not in _READ_VERSIONS:
        raise FormatError(
            f"{path} has format version {metadata['version']}; this release of Sixfold reads "
            f"versions up to {FORMAT_VERSION}: upgrade Sixfold, or write the file again."
        )
    if metadata["kind"] != kind:
        raise FormatError(f"{path} holds a {metadata['kind']!r}, expected a {kind!r}.")
    return metadata


def _parsed(path: Path, text: str) -> dict[str, Any]:
    try:
        description = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is damaged: its description is not JSON ({error}).") from error
    if not isinstance(description, dict):
        raise FormatError(f"{path} is damaged: its description is not a JSON object.")
    return description


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, no two in the same memory (safetensors refuses those)."""
    if not isinstance(tensors, Mapping):
        raise SixfoldError(f"tensors must be a mapping of names to tensors, got {shown(tensors)}")
    separate: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise SixfoldError(f"names of tensors must be strings, got {shown(name)}")
        dense(name, tensor)
        if tensor.dtype not in DTYPE_NAMES or tensor.is_meta:
            raise SixfoldError(
                f"{name}: expected numbers in one of {sorted(DTYPE_NAMES.values())}, got "
                f"{tensor.dtype} on {tensor.device}; convert it"
            )
        # Lazy tensors have other numbers in memory, or none.
        tensor = (tensor.detach().cpu() + 0).contiguous() if _lazy(tensor) else tensor
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return separate


def _lazy(tensor: Tensor) -> bool:
    return tensor.is_neg() or tensor._is_zerotensor()


def _digest(kind: str, description: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over everything a reader relies on; each part is preceded by its length."""
    digest = hashlib.sha256()
    for part in _digest_parts(kind, description, tensors):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def _digest_parts(
    kind: str, description: str, tensors: Mapping[str, Tensor]
) -> Iterator[bytes | memoryview]:
    yield kind.encode()
    yield description.encode()
    for name, tensor in sorted(tensors.items()):
        shape = ",".join(map(str, tensor.shape))
        yield f"{name} {DTYPE_NAMES[tensor.dtype]} {shape}".encode()
        yield _bytes(tensor)


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
