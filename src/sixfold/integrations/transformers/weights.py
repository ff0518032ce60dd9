"""A digest of all weights of a model: whose keys and values a cache holds."""

import contextlib
import hashlib
import importlib
import io
import itertools
from collections.abc import Iterator, Mapping
from functools import lru_cache
from types import NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sixfold._surroundings import outside_inference_mode
from sixfold.errors import FormatError

# What a digest begins with says how it was made. Earlier versions wrote "all:", blind to an even
# number of changed signs, and before that, without a prefix, the first numbers of every parameter.
_ALL = "all-2:"
_UNFOLDED = "all:"
# 512 KiB: a block and its product stay in the cache of a processor.
_WORDS = 1 << 16
_ADAPTERS = ("active_adapters", "disable_adapters", "scaling")


def weights_digest(
    model: nn.Module, prompt: nn.Module | None = None, kind: str = _ALL
) -> str | None:
    """A digest of every byte of every parameter and persistent buffer, and of adapters.

    All adapters that a model holds count, and which of them are active.

    Tensors that modules save beside those (packed weights, scales of quantized ones) count too.

    Those of `prompt`, which computes tokens that are in every cache of the model, count as well.

    Sums of products with odd factors, modulo 2^64, a block at a time on the device where the
    weights lie: a single word of a block that differs always shows, more of them all but always.
    Against accidents, not against malice. Nothing is remembered from one call to the next: PyTorch
    does not tell when weights have changed (`parameter.data` may be written to).

    Returns:
        The digest, or None where some weights cannot be read: they are on the meta device, and not
        because accelerate has offloaded them.
    """
    digest = hashlib.sha256()
    own = () if prompt is None else _weights(prompt)
    beside = ((f"prompt {name}", tensor) for name, tensor in own)
    for name, tensor in itertools.chain(_weights(model), beside):
        if tensor is None:
            return None
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(_block_sums(tensor, folded=kind == _ALL))
    for name, module in model.named_modules():
        digest.update(_adapters(name, module).encode())
    return kind + digest.hexdigest()


def check_weights(
    path: Any, stored: Any, model: nn.Module, prompt: nn.Module | None = None
) -> None:
    """Compare the digest of a file with a model.

    Args:
        path: The file, for messages.
        stored: Its digest; None says nothing.
        model: The model.
        prompt: See `weights_digest`.

    Raises:
        FormatError: The model has other weights, or some that cannot be read.
    """
    if stored is None:
        return
    kind = next((kind for kind in (_ALL, _UNFOLDED) if str(stored).startswith(kind)), None)
    found = weights_digest(model, prompt, kind) if kind else _first_numbers_digest(model)
    if found is None:
        raise FormatError(
            f"{path} names the weights it belongs to, but some of this model's are on the meta "
            "device and cannot be compared. Pass check_weights=False if they are the same."
        )
    if stored != found:
        raise FormatError(
            f"{path} was saved for other weights of the same architecture (adapters and dtype "
            "count); keys and values of one are noise to the other. Pass check_weights=False to "
            "load it all the same."
        )


def _first_numbers_digest(model: nn.Module) -> str | None:
    """What files of earlier versions hold: the first numbers of every parameter, as bfloat16."""
    digest = hashlib.sha256()
    parameters = {name for name, _ in model.named_parameters()}
    heads: dict[str, Tensor] = {}
    for name, tensor in _weights(model):
        if tensor is None:
            return None
        if name in parameters:
            heads[name] = tensor.flatten()[:8].to("cpu", torch.bfloat16)
    for name, head in sorted(heads.items()):
        digest.update(name.encode())
        digest.update(head.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    """Name and value of every tensor of a model's state; None where there is no value."""
    for prefix, module in model.named_modules():
        with _present(module):
            for name, tensor in (*_own_weights(module), *_packed_weights(module)):
                readable = tensor.device.type != "meta"
                yield f"{prefix}.{name}" if prefix else name, tensor.detach() if readable else None


def _own_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    temporary = module._non_persistent_buffers_set
    buffers = {k: v for k, v in module._buffers.items() if k not in temporary}
    for name, tensor in sorted({**module._parameters, **buffers}.items()):
        if tensor is not None:
            yield from _parts(name, tensor)


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors that one is put together of, as quantized and distributed ones are.

    Of one that is distributed there is what this process holds, which its cache belongs to.
    """
    if not is_traceable_wrapper_subclass(tensor):
        yield name, _plain(tensor)
        return
    inner, how = tensor.__tensor_flatten__()
    if not hasattr(tensor, "device_mesh"):
        for index, said in enumerate(_as_tensors([type(tensor).__name__, how])):
            yield f"{name}[{index}]", said
    for part in inner:
        # Where a distributed one lies stands beside its numbers.
        if isinstance(value := getattr(tensor, part), Tensor):
            yield from _parts(f"{name}.{part}", value)


def _packed_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a module keeps in a form of its own, as quantized ones do."""
    own = type(module)
    plain = own._save_to_state_dict is nn.Module._save_to_state_dict
    if plain and own.get_extra_state is nn.Module.get_extra_state:
        return
    saved: dict[str, Any] = {}
    # What `state_dict` asks of each module.
    module._save_to_state_dict(saved, "", False)
    known = {name for name, _ in _own_weights(module)}
    for name in sorted(saved.keys() - known):
        for index, tensor in enumerate(_as_tensors(saved[name])):
            yield f"{name}[{index}]", tensor


def _as_tensors(value: Any) -> Iterator[Tensor]:
    """All that a value holds, as tensors; of objects of unknown kinds only what kind they are.

    What is no tensor, numbers, words and how all is put together, is one tensor of bytes.
    """
    words: list[bytes] = []
    left, seen = [value], dict[int, int]()
    while left:
        one = left.pop()
        if isinstance(one, Mapping | tuple | list):
            if id(one) in seen:
                words.append(f"number {seen[id(one)]} again".encode())
                continue
            seen[id(one)] = len(seen)
            parts = [*itertools.chain(*one.items())] if isinstance(one, Mapping) else [*one]
            words.append(f"{type(one).__name__} of {len(parts)}".encode())
            left += reversed(parts)
        elif isinstance(one, Tensor):
            words.append(b"tensor")
            yield from (tensor for _, tensor in _parts("", one))
        else:
            data = _as_bytes(one)
            words.append(f"{type(one).__name__} of {len(data)}: ".encode() + data)
    yield torch.frombuffer(bytearray(b", ".join(words)), dtype=torch.uint8)


def _as_bytes(value: Any) -> bytes:
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return f"{value.dtype} {value.shape} ".encode() + value.tobytes()
    if isinstance(value, io.BytesIO):
        return value.getvalue()
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    if isinstance(value, str | int | float | complex | NoneType | torch.dtype):
        return repr(value).encode()
    return b"unknown"


def _plain(tensor: Tensor) -> Tensor:
    """The numbers of a quantized, sparse or lazy tensor one after the other."""
    tensor = tensor.dequantize() if tensor.is_quantized else tensor
    tensor = tensor.resolve_conj().resolve_neg()
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def _present(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """While it lasts, what accelerate has offloaded of `module` itself is on the CPU."""
    if not any(tensor.device.type == "meta" for _, tensor in _own_weights(module)):
        return contextlib.nullcontext()
    if not hasattr(module, "_hf_hook"):
        return contextlib.nullcontext()
    # There is a hook of it: it is installed.
    utilities = importlib.import_module("accelerate.utils")
    present: contextlib.AbstractContextManager[None] = utilities.align_module_device(module, "cpu")
    return present


def _block_sums(tensor: Tensor, folded: bool) -> bytes:
    """A sum for every block of a tensor's bytes, read as 64-bit words; the last is filled up."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    if data.storage_offset() % 8:
        data = data.clone()
    whole = len(data) // 8 * 8
    rest = torch.nn.functional.pad(data[whole:], (0, -len(data) % 8))
    factors = _factors(tensor.device)
    parts = (data[:whole].view(torch.int64), rest.view(torch.int64))
    blocks = (block for part in parts for block in part.split(_WORDS) if len(block))
    fold = _folded if folded else (lambda block: block)
    sums = [_product(fold(block), factors[: len(block)]) for block in blocks]
    if not sums:
        return b""
    return torch.stack(sums).cpu().numpy().astype("<i8").tobytes()


def _folded(block: Tensor) -> Tensor:
    """The words, one to one, with their upper bits among the lower as well.

    Times any odd number the highest bit is itself, and two of them cancel: lower bits are told
    apart. By a number of bits that no number in a word begins at, lest its neighbour's cancel it.
    """
    return (block >> 29).bitwise_and_(2**35 - 1).bitwise_xor_(block)


def _product(x: Tensor, y: Tensor) -> Tensor:
    # On a CPU, one thread and no copy; other devices have no such product of whole numbers.
    return torch.dot(x, y) if x.device.type == "cpu" else (x * y).sum()


@lru_cache(maxsize=8)
@outside_inference_mode
def _factors(device: torch.device) -> Tensor:
    """Odd numbers of 64 bits, the same on every machine (SplitMix64)."""
    mask, found = 2**64 - 1, []
    for index in range(1, _WORDS + 1):
        z = index * 0x9E3779B97F4A7C15 & mask
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        found.append((z ^ z >> 31) | 1)
    signed = [x - 2**64 if x >> 63 else x for x in found]
    return torch.tensor(signed, dtype=torch.int64, device=device)


def _adapters(name: str, module: nn.Module) -> str:
    """Which adapters a layer of PEFT applies, and how much: no weight says so."""
    # The type is asked for what is computed: a wrapper's attributes may be those of what it wraps.
    if not isinstance(getattr(type(module), "active_adapters", None), property):
        return ""
    return f"{name} {[getattr(module, field, None) for field in _ADAPTERS]}\n"
