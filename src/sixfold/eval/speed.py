"""Operations on codes beside PyTorch on the originals: what is timed, and what it has to move.

Errors are against the same operation on the original bfloat16 vectors in float64.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import BFloat16
from torch import Tensor

from sixfold.cache import CachePolicy, CompressedLayer
from sixfold.errors import SixfoldError
from sixfold.eval.progress import Progress, Steps, no_progress
from sixfold.eval.timing import Case, Contender, Row, measure
from sixfold.kernels.types import CodeName
from sixfold.packing import Bits
from sixfold.quantizers import TurboQuantMSE

DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
# Seconds before a call: see `timing.measure`.
SETTLE = 0.01


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """One layer's decode step: a sequence of `tokens` and one new query a head."""

    tokens: int = 32768
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128


@dataclass(frozen=True, slots=True)
class Inputs:
    """Queries, keys and values of one sequence."""

    query: BFloat16[Tensor, "1 heads 1 dim"]
    keys: BFloat16[Tensor, "1 kv_heads tokens dim"]
    values: BFloat16[Tensor, "1 kv_heads tokens dim"]

    @property
    def grouped_query(self) -> BFloat16[Tensor, "1 kv_heads group dim"]:
        """The queries that share each key head."""
        return self.query.view(1, self.keys.shape[1], -1, self.keys.shape[3])


Layers: TypeAlias = tuple[Inputs, Inputs]
"""A layer, and the one that a model would compute before it: equal, in memory of its own."""


def layers(shape: AttentionShape, device: torch.device, seed: int = 0) -> Layers:
    """Gaussian inputs of two equal layers.

    Raises:
        SixfoldError: Heads do not divide into key heads.
    """
    if shape.heads % shape.kv_heads:
        raise SixfoldError(
            f"query heads must be a multiple of key heads, got {shape.heads} and {shape.kv_heads}"
        )
    generator = torch.Generator(device).manual_seed(seed)

    def gaussian(heads: int, tokens: int) -> Tensor:
        size = (1, heads, tokens, shape.head_dim)
        return torch.randn(size, generator=generator, device=device).bfloat16()

    keys, values = (gaussian(shape.kv_heads, shape.tokens) for _ in range(2))
    query = gaussian(shape.heads, 1)
    return Inputs(query, keys, values), Inputs(query, keys.clone(), values.clone())


def attention_case(
    layers: Layers,
    widths: Sequence[Bits],
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,),
    codes: Sequence[CodeName] = (CachePolicy.code,),
) -> Case:
    """One query a head over the whole context."""
    contenders = []
    for dtype in dtypes:
        tensors = [[x.to(dtype) for x in (one.query, one.keys, one.values)] for one in layers]
        nbytes = sum(x.nbytes for x in tensors[0][1:])
        for kind, attend in (("sdpa", _sdpa), ("matmul", _grouped_attention)):
            call, lead = (partial(attend, *each) for each in tensors)
            name = f"torch {kind} {DTYPES[dtype]}"
            contenders.append(Contender(name, call, nbytes, lead=lead))
    first = layers[0]
    contenders += [
        attention_on_codes(layers, bits, first.keys.shape[2], code)
        for bits in widths
        for code in codes
    ]
    exact = _grouped_attention(first.query.double(), first.keys.double(), first.values.double())
    return Case(contenders, exact)


def contender_name(bits: Bits, code: CodeName) -> str:
    """What one of ours is called; its code is named where it is not the default."""
    return f"sixfold {bits:g} bits" + ("" if code == CachePolicy.code else f", {code}")


def attention_on_codes(
    layers: Layers, bits: Bits, step: int, code: CodeName = CachePolicy.code
) -> Contender:
    """Real cache layers, filled `step` tokens at a time.

    Sinks, window, mapping and rotation of the query are included.
    """
    policy, calls = CachePolicy.spending(bits, code=code), []
    for one in layers:
        layer = CompressedLayer(one.keys, one.values, policy)
        for chunk in zip(one.keys.split(step, 2), one.values.split(step, 2), strict=True):
            layer.append(*chunk)
            layer.compress()
        calls.append(partial(layer.attend, one.query, scaling=one.keys.shape[3] ** -0.5))
        held = sum(tensor.nbytes for tensor in layer.tensors())
    call, lead = calls
    name, notes = contender_name(bits, code), {"bits": bits, "code": code}
    return Contender(name, call, held, lead=lead, notes=notes)


def encode_case(layers: Layers, widths: Sequence[Bits]) -> Case:
    """Vectors to codes, beside copying them; the error is that of the decoded vectors."""
    keys, before = (one.keys for one in layers)
    target = torch.empty_like(keys)
    copy, lead = (partial(target.copy_, x) for x in (keys, before))
    contenders = [Contender("copy of the bfloat16", copy, 2 * keys.nbytes, lead=lead)]
    for bits in widths:
        quantizer = TurboQuantMSE(keys.shape[3], bits)
        encode, other = (partial(quantizer.encode, x) for x in (keys, before))
        name, moved, notes = f"sixfold {bits:g} bits", keys.nbytes + encode().nbytes, {"bits": bits}
        contenders.append(Contender(name, encode, moved, quantizer.decode, lead=other, notes=notes))
    return Case(contenders, keys.double())


def scores_case(
    layers: Layers, widths: Sequence[Bits], dtypes: Sequence[torch.dtype] = (torch.bfloat16,)
) -> Case:
    """Inner products of every query with every key of its head."""
    query, (keys, before) = layers[0].grouped_query, (one.keys for one in layers)
    contenders = []
    for dtype in dtypes:
        tensors = [(query.to(dtype), x.to(dtype)) for x in (keys, before)]
        call, lead = (partial(_matmul, *each) for each in tensors)
        name, nbytes = f"torch matmul {DTYPES[dtype]}", tensors[0][1].nbytes
        contenders.append(Contender(name, call, nbytes, lead=lead))
    for bits in widths:
        quantizer = TurboQuantMSE(keys.shape[3], bits, scale="unbiased")
        codes, others = quantizer.encode(keys), quantizer.encode(before)
        call, lead = (partial(quantizer.scores, query, x) for x in (codes, others))
        name, notes = f"sixfold {bits:g} bits", {"bits": bits}
        contenders.append(Contender(name, call, codes.nbytes, lead=lead, notes=notes))
    return Case(contenders, _matmul(query.double(), keys.double()))


def _sdpa(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)


def _grouped_attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Queries that share a key head as the rows of one matrix product."""
    grouped = query.view(1, keys.shape[1], -1, keys.shape[3])
    weights = (grouped @ keys.mT * keys.shape[3] ** -0.5).softmax(-1)
    return torch.matmul(weights, values).view(query.shape)


def _matmul(query: Tensor, keys: Tensor) -> Tensor:
    return query @ keys.mT


CASES: dict[str, Callable[[Layers, Sequence[Bits]], Case]] = {
    "attention": attention_case,
    "encode": encode_case,
    "scores": scores_case,
}
OPERATIONS = tuple(CASES)


def measure_speed(
    operations: Sequence[str],
    shape: AttentionShape,
    widths: Sequence[Bits],
    *,
    repeats: int = 9,
    seed: int = 0,
    progress: Progress = no_progress,
) -> dict[str, list[Row]]:
    """Time operations at several widths beside full precision, on the GPU if there is one.

    Raises:
        SixfoldError: There is no such operation, or heads do not divide into key heads.
    """
    if unknown := set(operations) - set(OPERATIONS):
        raise SixfoldError(f"expected operations among {OPERATIONS}, got {sorted(unknown)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs, rows = layers(shape, device, seed), {}
    steps = Steps(progress, len(operations))
    for operation in operations:
        case = CASES[operation](inputs, widths)
        rows[operation] = measure(case, repeats=repeats, settle=SETTLE)
        steps.done(operation)
    return rows
