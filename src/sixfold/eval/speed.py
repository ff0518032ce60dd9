"""Operations on codes against PyTorch on the originals: time, bytes read, and error.

Every operation is timed together with its baselines, in turn; every error is against the same
operation on the original bfloat16 vectors in float64.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import BFloat16
from torch import Tensor

from sixfold.cache import CachePolicy, CompressedLayer
from sixfold.errors import SixfoldError
from sixfold.eval.progress import Progress, no_progress
from sixfold.eval.timing import Timing, interleave
from sixfold.packing import Bits
from sixfold.quantizers import TurboQuantMSE

OPERATIONS = ("attention", "encode", "scores")


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """One layer's decode step: a sequence of `tokens` and one new query a head."""

    tokens: int = 32768
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128


@dataclass(frozen=True, slots=True)
class Measured:
    """One implementation of an operation.

    Attributes:
        operation: What was computed.
        implementation: How, or at how many bits.
        time: Seconds a call.
        error: Norm of the difference to float64 over the norm of the float64 result.
        nbytes: Bytes of keys, values or codes that the operation has to read.
    """

    operation: str
    implementation: str
    time: Timing
    error: float
    nbytes: int

    @property
    def gigabytes_per_second(self) -> float:
        """Those bytes over the median time."""
        return self.nbytes / self.time.median / 1e9

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {**asdict(self), "gigabytes_per_second": self.gigabytes_per_second}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A call to time, with what it reads and how its result becomes comparable."""

    call: Callable[[], Any]
    nbytes: int
    finish: Callable[[Any], Tensor] = lambda result: result


@dataclass(frozen=True, slots=True)
class Inputs:
    """Gaussian queries, keys and values of one sequence."""

    query: BFloat16[Tensor, "1 heads 1 dim"]
    keys: BFloat16[Tensor, "1 kv_heads tokens dim"]
    values: BFloat16[Tensor, "1 kv_heads tokens dim"]

    @property
    def grouped_query(self) -> BFloat16[Tensor, "1 kv_heads group dim"]:
        """The queries that share each key head."""
        return self.query.view(1, self.keys.shape[1], -1, self.keys.shape[3])


Case: TypeAlias = tuple[dict[str, Candidate], Tensor]


def measure_speed(
    operations: Sequence[str],
    shape: AttentionShape,
    widths: Sequence[Bits],
    *,
    repeats: int = 9,
    seed: int = 0,
    progress: Progress = no_progress,
) -> list[Measured]:
    """Time operations at several widths beside their full-precision baselines.

    Raises:
        SixfoldError: There is no such operation, or heads do not divide into key heads.
    """
    if unknown := set(operations) - set(OPERATIONS):
        raise SixfoldError(f"expected operations among {OPERATIONS}, got {sorted(unknown)}")
    if shape.heads % shape.kv_heads:
        raise SixfoldError(
            f"query heads must be a multiple of key heads, got {shape.heads} and {shape.kv_heads}"
        )
    inputs, rows = _inputs(shape, seed), []
    for done, operation in enumerate(operations, 1):
        candidates, exact = _CASES[operation](inputs, widths)
        times = interleave({name: one.call for name, one in candidates.items()}, repeats=repeats)
        for name, one in candidates.items():
            error = relative_error(one.finish(one.call()), exact)
            rows.append(Measured(operation, name, times[name], error, one.nbytes))
        progress(done, len(operations))
    return rows


def relative_error(result: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of the exact result."""
    return float((result.double() - exact).norm() / exact.norm())


def _inputs(shape: AttentionShape, seed: int) -> Inputs:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(seed)

    def gaussian(heads: int, tokens: int) -> Tensor:
        size = (1, heads, tokens, shape.head_dim)
        return torch.randn(size, generator=generator, device=device).bfloat16()

    keys, values = (gaussian(shape.kv_heads, shape.tokens) for _ in range(2))
    return Inputs(gaussian(shape.heads, 1), keys, values)


def _attention(inputs: Inputs, widths: Sequence[Bits]) -> Case:
    """One query a head over the whole context; codes go through a real cache layer."""
    query, keys, values = inputs.query, inputs.keys, inputs.values
    scaling = keys.shape[3] ** -0.5
    exact = _grouped_attention(inputs.grouped_query.double(), keys.double(), values.double())
    exact = exact.view(query.shape)
    size = keys.nbytes + values.nbytes
    candidates = {
        "sdpa bf16": Candidate(
            lambda: F.scaled_dot_product_attention(query, keys, values, enable_gqa=True), size
        ),
        "grouped matmul bf16": Candidate(
            lambda: _grouped_attention(inputs.grouped_query, keys, values).view(query.shape), size
        ),
    }
    for bits in widths:
        layer = CompressedLayer(keys, values, CachePolicy(key_bits=bits, value_bits=bits))
        layer.append(keys, values)
        layer.compress()
        held = sum(tensor.nbytes for tensor in layer.tensors())
        candidates[f"codes {bits:g} bits"] = Candidate(
            partial(layer.attend, query, scaling=scaling), held
        )
    return candidates, exact


def _grouped_attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    weights = (query @ keys.mT * keys.shape[3] ** -0.5).softmax(-1)
    return torch.matmul(weights, values)


def _encode(inputs: Inputs, widths: Sequence[Bits]) -> Case:
    """Vectors to codes, beside copying them; the error is that of the decoded vectors."""
    keys = inputs.keys
    candidates = {"copy bf16": Candidate(keys.clone, keys.nbytes)}
    for bits in widths:
        quantizer = TurboQuantMSE(keys.shape[3], bits)
        candidates[f"{bits:g} bits"] = Candidate(
            partial(quantizer.encode, keys), keys.nbytes, quantizer.decode
        )
    return candidates, keys.double()


def _scores(inputs: Inputs, widths: Sequence[Bits]) -> Case:
    """Inner products of every query with every key of its head."""
    query, keys = inputs.grouped_query, inputs.keys
    exact = query.double() @ keys.double().mT
    candidates = {"matmul bf16": Candidate(lambda: query @ keys.mT, keys.nbytes)}
    for bits in widths:
        quantizer = TurboQuantMSE(keys.shape[3], bits, scale="unbiased")
        codes = quantizer.encode(keys)
        candidates[f"codes {bits:g} bits"] = Candidate(
            partial(quantizer.scores, query, codes), codes.nbytes
        )
    return candidates, exact


_CASES: dict[str, Callable[[Inputs, Sequence[Bits]], Case]] = {
    "attention": _attention,
    "encode": _encode,
    "scores": _scores,
}
