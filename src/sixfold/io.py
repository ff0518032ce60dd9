"""The file container: safetensors with a description and a digest (docs/format.md).

Nothing is unpickled, and nothing is allocated before the header has been checked.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sixfold.errors import FormatError

FORMAT_VERSION = 1
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.uint8: "U8",
}
_MAGIC = "sixfold"


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Shape and safetensors dtype name of a stored tensor."""

    shape: tuple[int, ...]
    dtype: str


def write_container(
    path: str | os.PathLike[str],
    kind: str,
    description: Mapping[str, Any],
    tensors: dict[str, Tensor],
) -> None:
    """Write a file in one step: at every moment `path` is the old file or the new one, whole.

    Args:
        path: Where to.
        kind: What the file holds, such as "cache".
        description: JSON values that describe the tensors.
        tensors: What to store.

    Raises:
        OSError: The file cannot be written; an older one is still whole.
    """
    tensors = _separate(tensors)
    text = json.dumps(description, sort_keys=True, allow_nan=False)
    metadata = {
        "format": _MAGIC,
        "version": str(FORMAT_VERSION),
        "kind": kind,
        "description": text,
        "sha256": _digest(kind, text, tensors),
    }
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        # Created here first: a folder that is missing or closed is an OSError, and the mode is
        # what the umask says, where `save_file` makes files that only their owner can read.
        with temporary.open("xb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        save_file(tensors, temporary, metadata)
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    except SafetensorError as error:
        raise OSError(f"cannot write {target}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


class Container:
    """A file that has passed the checks of its header; tensors are read on demand."""

    def __init__(self, path: Path, handle: Any, kind: str) -> None:
        self._path = path
        self._handle = handle
        self._metadata = _checked_metadata(path, handle.metadata() or {}, kind)
        self.description: dict[str, Any] = _parsed(path, self._metadata["description"])
        self.specs = {name: _spec(handle, name) for name in handle.keys()}

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

    def read(self) -> dict[str, Tensor]:
        """All tensors, on the CPU.

        Raises:
            FormatError: The bytes are not the ones that were written.
        """
        # The handle's tensors are the mapped file: what happens to it later must not show.
        tensors = {name: self._handle.get_tensor(name).clone() for name in self.specs}
        digest = _digest(self._metadata["kind"], self._metadata["description"], tensors)
        if digest != self._metadata["sha256"]:
            raise FormatError(f"{self._path} is damaged: its contents do not match its checksum.")
        return tensors


@contextlib.contextmanager
def open_container(path: str | os.PathLike[str], kind: str) -> Iterator[Container]:
    """Open a file written by `write_container`.

    Raises:
        FormatError: Not such a file, of another kind or a newer version, cut short or damaged.
        OSError: The file cannot be read.
    """
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"no such file: {source}")
    try:
        with safe_open(source, framework="pt") as handle:
            yield Container(source, handle, kind)
    except SafetensorError as error:
        raise FormatError(
            f"{source} is not a Sixfold file, or it is damaged or cut short ({error}). "
            f"Expected a safetensors container written by Sixfold."
        ) from error


def _checked_metadata(path: Path, metadata: dict[str, str], kind: str) -> dict[str, str]:
    wanted = {"format", "version", "kind", "description", "sha256"}
    if metadata.get("format") != _MAGIC or not wanted <= metadata.keys():
        raise FormatError(f"{path} is a safetensors file, but not one written by Sixfold.")
    if metadata["version"] != str(FORMAT_VERSION):
        raise FormatError(
            f"{path} has format version {metadata['version']}; this release of Sixfold reads "
            f"version {FORMAT_VERSION}: upgrade Sixfold, or write the file again."
        )
    if metadata["kind"] != kind:
        raise FormatError(f"{path} holds a {metadata['kind']!r}, expected a {kind!r}.")
    return metadata


def _parsed(path: Path, text: str) -> dict[str, Any]:
    try:
        description = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is damaged: its description is not JSON ({error}).") from error
    if not isinstance(description, dict):
        raise FormatError(f"{path} is damaged: its description is not a JSON object.")
    return description


def _spec(handle: Any, name: str) -> TensorSpec:
    view = handle.get_slice(name)
    return TensorSpec(tuple(view.get_shape()), view.get_dtype())


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, no two in the same memory (safetensors refuses those)."""
    separate: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return separate


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
        yield tensor.reshape(-1).view(torch.uint8).numpy().data
