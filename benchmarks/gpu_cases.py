"""What `benchmarks.gpu` times: our kernels and full-precision ones on the same data, on a GPU."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from sixfold.codebooks import centroids
from sixfold.eval.timing import Contender
from sixfold.kernels._dispatch import implementation
from sixfold.kernels.encode import Scale, encode, store_pages
from sixfold.kernels.rotate import rotate
from sixfold.kernels.scores import scores
from sixfold.kernels.types import CodeName, Coding, Pages, Pool
from sixfold.packing import PAGE_TOKENS, Bits, row_bytes
from sixfold.rotation import Rotation
from sixfold.trellis import PAGE_STATES, codewords

Call: TypeAlias = Callable[[], Any]
# Keys and values of a sequence are made and stored this many tokens at a time.
CHUNK = 1 << 14


@dataclass(frozen=True, slots=True)
class Shape:
    """Heads of a model: Llama 3 8B's unless it is only about running at all."""

    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    hidden: int = 4096
    inner: int = 14336


@dataclass(slots=True)
class Paged:
    """A layer's compressed history, every page in its own slot."""

    pages: Pages
    first_token: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes that attention has to read."""
        return sum(x.nbytes for x in self.pages.pool)


@dataclass(frozen=True, slots=True)
class Code:
    """What a layer's keys and values are held in."""

    bits: Bits
    name: CodeName = "codebook"

    def __str__(self) -> str:
        return f"{'trellis ' * (self.name == 'trellis')}{self.bits:g} bits"


def tables(
    dim: int, bits: Bits, device: torch.device, code: CodeName = "codebook"
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotation and codebook, or the codewords of a trellis."""
    rotation, trellis = Rotation(dim), code == "trellis"
    book = codewords(PAGE_STATES, bits, device) if trellis else centroids(dim, bits, device)
    return rotation.turns(device), rotation.factor(device), book


def empty_pages(
    count: int, heads: int, coding: Coding, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Storage for pages of one side of a layer."""
    size = PAGE_TOKENS * row_bytes(*coding.row)
    pages = torch.zeros(count, heads, size, dtype=torch.uint8, device=device)
    scales = torch.zeros(count, heads, PAGE_TOKENS, dtype=torch.float16, device=device)
    return pages, scales


def codings(dim: int, code: Code, device: torch.device) -> tuple[Coding, Coding]:
    """How a layer codes keys, and values."""
    scales: tuple[Scale, Scale] = "unbiased", "optimal"
    arrays = tables(dim, code.bits, device, code.name)
    keys, values = (Coding(*arrays, code.bits, dim, scale, code.name) for scale in scales)
    return keys, values


def store(keys: Tensor, values: Tensor, code: Code, paged: Paged, slots: Tensor) -> None:
    """Encode keys and values, as a layer does."""
    how = codings(keys.shape[-1], code, keys.device)
    store_pages(keys, values, slots, paged.pages.pool, *how)


def compressed(keys: Tensor, values: Tensor, code: Code, shape: Shape) -> Paged:
    """The store's pages of a layer, a chunk of tokens at a time."""
    batch, tokens, device = keys.shape[0], keys.shape[2], keys.device
    count = tokens // PAGE_TOKENS
    keys_and_values = [
        empty_pages(batch * count, shape.kv_heads, coding, device)
        for coding in codings(shape.dim, code, device)
    ]
    pages = Pages(
        Pool(*keys_and_values[0], *keys_and_values[1]),
        torch.arange(batch * count, device=device).view(batch, -1),
        torch.arange(count, device=device)[None] * PAGE_TOKENS,
        torch.full((1, count), PAGE_TOKENS, device=device),
        0,
    )
    paged = Paged(pages, torch.zeros(batch, 1, dtype=torch.long, device=device))
    for start in range(0, tokens, CHUNK):
        part = pages.slots[:, start // PAGE_TOKENS : (start + CHUNK) // PAGE_TOKENS]
        chunk = slice(start, start + CHUNK)
        store(keys[:, :, chunk], values[:, :, chunk], code, paged, part)
    return paged


def attend(query: Tensor, paged: Paged, code: Code) -> Tensor:
    """A decode step on codes, queries rotated and the output rotated back."""
    dim, device = query.shape[-1], query.device
    keys, values = codings(dim, code, device)
    mapped = rotate(query * dim**-0.5, keys.turns, keys.factor)
    on_pages = implementation("attention", device).page_attention
    part = on_pages(mapped, paged.pages, keys, values, paged.first_token)
    return rotate(part.out, values.turns, values.factor, inverse=True)


def exact_attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """In float64, a sequence and a KV head at a time."""
    batch, heads, queries, dim = query.shape
    grouped = query.double().view(batch, keys.shape[1], -1, dim)
    out = torch.empty_like(grouped)
    for b in range(batch):
        for h in range(keys.shape[1]):
            weights = (grouped[b, h] @ keys[b, h].double().mT * dim**-0.5).softmax(-1)
            out[b, h] = weights @ values[b, h].double()
    return out.view(batch, heads, queries, dim)


def captured(call: Call) -> Call | None:
    """A CUDA graph of `call`: its kernels without the host's time between them; None if it cannot.

    Three calls come first: kernels are compiled, and workspaces found, before the capture.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        return None
    torch.cuda.synchronize()
    replay: Call = graph.replay
    return replay


def calls(call: Call) -> list[float]:
    """Seconds of many calls by CUDA events, a cold cache before every one."""
    from triton.testing import do_bench

    times: list[float] = do_bench(call, warmup=20, rep=80, return_mode="all")
    return [one / 1e3 for one in times]


def random(*size: int, device: torch.device, seed: int) -> Tensor:
    """Gaussian bfloat16, made where it is used."""
    return torch.randn(
        size, generator=torch.Generator(device).manual_seed(seed), device=device, dtype=torch.float
    ).bfloat16()


def inputs(
    batch: int, tokens: int, shape: Shape, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """A query of every sequence, and keys and values of a context."""
    held = batch, shape.kv_heads, tokens, shape.dim
    keys, values = (random(*held, device=device, seed=seed) for seed in (1, 2))
    return random(batch, shape.heads, 1, shape.dim, device=device, seed=3), keys, values


def logits_contenders(
    batch: int, tokens: int, bits: tuple[Bits, ...], shape: Shape, device: torch.device
) -> Iterator[tuple[Contender, Tensor]]:
    """Inner products of one query a head with every key, and what the first ones are exactly."""
    queries = random(
        batch, shape.kv_heads, shape.heads // shape.kv_heads, shape.dim, device=device, seed=1
    )
    keys = random(batch, shape.kv_heads, tokens, shape.dim, device=device, seed=2)
    exact = queries.double() @ keys[:, :, :4096].double().mT

    def first(result: Tensor) -> Tensor:
        return result[..., :4096]

    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        q, k = queries.to(dtype), keys.to(dtype)
        call: Call = partial(torch.matmul, q, k.mT)
        yield Contender(f"keys {name}", call, k.nbytes, first), exact
        del k, call
    for width in bits:
        turns, factor, book = tables(shape.dim, width, device)
        rows, scales = encode(keys, turns, factor, book, bits=width, scale="unbiased")
        rotated = rotate(queries, turns, factor)
        call = partial(scores, rotated, rows, scales, book, bits=width)
        nbytes = rows.nbytes + scales.nbytes
        yield Contender(f"codes {width:g} bits", call, nbytes, first), exact


def prefill_layer(tokens: int, shape: Shape, device: torch.device) -> Call:
    """The matrix products and the attention of one layer over a prompt, in bfloat16."""
    x = random(tokens, shape.hidden, device=device, seed=3)
    widths = [(shape.heads + 2 * shape.kv_heads) * shape.dim, shape.hidden, 2 * shape.inner]
    weights = [random(shape.hidden, width, device=device, seed=4) for width in widths]
    down = random(shape.inner, shape.hidden, device=device, seed=5)
    split = [shape.heads * shape.dim, *[shape.kv_heads * shape.dim] * 2]

    def layer() -> Tensor:
        q, k, v = (
            part.view(1, tokens, -1, shape.dim).transpose(1, 2)
            for part in (x @ weights[0]).split(split, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        hidden = mixed.transpose(1, 2).reshape(tokens, -1)[:, : shape.hidden] @ weights[1]
        gate, up = (hidden @ weights[2]).chunk(2, dim=-1)
        return (F.silu(gate) * up) @ down

    return layer
