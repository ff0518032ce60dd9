"""A layer's decode attention: one query a head over the whole context."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import vllm_peer
from benchmarks.harness import Case, Contender
from benchmarks.ours import Options, variants
from sixfold.cache import CachePolicy, CompressedLayer
from sixfold.packing import PAGE_TOKENS, Bits

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
TOKENS = (1024, 4096, 32768, 131072)
SCALING = HEAD_DIM**-0.5


def case(tokens: int, options: Options) -> Case:
    """Ours against attention of PyTorch, and of vLLM where there is one, on the same bfloat16."""
    generator = torch.Generator().manual_seed(tokens)
    query = torch.randn(1, HEADS, 1, HEAD_DIM, generator=generator).bfloat16()
    size = (1, KV_HEADS, tokens, HEAD_DIM)
    keys, values = (torch.randn(size, generator=generator).bfloat16() for _ in range(2))
    # A layer, and the one that a model attends to before it: equal, in memory of its own.
    layers = [(query, keys, values), (query, keys.clone(), values.clone())]
    contenders = []
    for bits in options.bits:
        contenders += variants("attention", _codes(layers, bits, tokens), options)
    if options.bits:
        grown = _codes(layers, options.bits[0], PAGE_TOKENS)
        contenders.append(replace(grown, name=f"{grown.name}, grown page by page"))
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        tensors = [[x.to(dtype) for x in layer] for layer in layers]
        size_bytes = sum(x.nbytes for x in tensors[0][1:])
        for kind, attend in (("sdpa", _sdpa), ("matmul", _grouped)):
            call, lead = (partial(attend, *each) for each in tensors)
            contenders.append(Contender(f"torch {kind} {name}", call, size_bytes, lead=lead))
    if options.vllm_python is not None:
        contenders += vllm_peer.contenders(options.vllm_python, query, keys, values)
    return Case(contenders, _grouped(query.double(), keys.double(), values.double()))


def _codes(layers: Sequence[tuple[Tensor, Tensor, Tensor]], bits: Bits, step: int) -> Contender:
    """Real cache layers, filled `step` tokens at a time.

    Sinks, window, mapping and rotation of the query are included.
    """
    policy = CachePolicy.spending(bits)
    calls: list[Callable[[], Tensor]] = []
    for query, keys, values in layers:
        layer = CompressedLayer(keys, values, policy)
        for chunk in zip(keys.split(step, 2), values.split(step, 2), strict=True):
            layer.append(*chunk)
            layer.compress()
        calls.append(partial(layer.attend, query, scaling=SCALING))
        held = sum(tensor.nbytes for tensor in layer.tensors())
    call, lead = calls
    return Contender(f"sixfold {bits:g} bits", call, held, lead=lead, notes={"bits": bits})


def _sdpa(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)


def _grouped(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Queries that share a key head as the rows of one matrix product."""
    grouped = query.view(1, KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)
    weights = (grouped @ keys.mT * SCALING).softmax(-1)
    return torch.matmul(weights, values).view(query.shape)
