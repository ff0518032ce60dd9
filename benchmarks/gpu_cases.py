"""What `benchmarks.gpu` times: our kernels and full-precision ones on the same data, on a GPU."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from sixfold.codebooks import centroids
from sixfold.kernels.attention import page_attention
from sixfold.kernels.encode import encode, encode_pages
from sixfold.kernels.rotate import rotate
from sixfold.kernels.scores import scores
from sixfold.packing import PAGE_TOKENS, Bits, Layout, n_symbols, row_bytes, symbol_bits
from sixfold.rotation import Rotation

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


@dataclass(frozen=True, slots=True)
class Timed:
    """A contender: what it reads and writes, and how wrong it is."""

    name: str
    call: Call
    nbytes: int
    error: float | None = None


@dataclass(slots=True)
class Paged:
    """A layer's compressed history, every page in its own slot."""

    keys: tuple[Tensor, Tensor]
    values: tuple[Tensor, Tensor]
    slots: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes that attention has to read."""
        return sum(x.nbytes for x in (*self.keys, *self.values))


def tables(dim: int, bits: Bits, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rotation and codebook."""
    rotation = Rotation(dim)
    return rotation.turns(device), rotation.factor(device), centroids(dim, bits, device)


def empty_pages(
    batch: int, tokens: int, shape: Shape, bits: Bits, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Storage for one side of a layer."""
    count = batch * (tokens // PAGE_TOKENS)
    size = PAGE_TOKENS * row_bytes(n_symbols(shape.dim, bits), symbol_bits(bits))
    pages = torch.zeros(count, shape.kv_heads, size, dtype=torch.uint8, device=device)
    scales = torch.zeros(count, shape.kv_heads, PAGE_TOKENS, dtype=torch.float16, device=device)
    return pages, scales


def store(
    x: Tensor, bits: Bits, layout: Layout, target: tuple[Tensor, Tensor], slots: Tensor
) -> None:
    """Encode [batch, heads, tokens, dim] into its slots."""
    encode_pages(
        x,
        None,
        None,
        *tables(x.shape[-1], bits, x.device),
        bits=bits,
        scale="unbiased" if layout == "key" else "optimal",
        layout=layout,
        pages=target[0],
        scales=target[1],
        slots=slots,
    )


def compressed(keys: Tensor, values: Tensor, bits: Bits, shape: Shape) -> Paged:
    """The store's pages of a layer, a chunk of tokens at a time."""
    batch, tokens = keys.shape[0], keys.shape[2]
    slots = torch.arange(batch * (tokens // PAGE_TOKENS), device=keys.device).view(batch, -1)
    sides = [empty_pages(batch, tokens, shape, bits, keys.device) for _ in range(2)]
    layouts: tuple[Layout, Layout] = ("key", "value")
    for x, layout, target in zip((keys, values), layouts, sides, strict=True):
        for start in range(0, tokens, CHUNK):
            part = slots[:, start // PAGE_TOKENS : (start + CHUNK) // PAGE_TOKENS]
            store(x[:, :, start : start + CHUNK], bits, layout, target, part)
    return Paged(sides[0], sides[1], slots)


def attend(query: Tensor, paged: Paged, bits: Bits) -> Tensor:
    """A decode step on codes, queries rotated and the output rotated back."""
    dim, device = query.shape[-1], query.device
    turns, factor, book = tables(dim, bits, device)
    n_pages = paged.slots.shape[1]
    part = page_attention(
        rotate(query * dim**-0.5, turns, factor),
        *paged.keys,
        *paged.values,
        paged.slots,
        torch.arange(n_pages, device=device) * PAGE_TOKENS,
        torch.full((n_pages,), PAGE_TOKENS, device=device),
        torch.zeros(query.shape[0], query.shape[2], dtype=torch.long, device=device),
        book,
        book,
        key_bits=bits,
        value_bits=bits,
        value_dim=dim,
    )
    return rotate(part.out, turns, factor, inverse=True)


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


def sdpa_contenders(query: Tensor, keys: Tensor, values: Tensor) -> Iterator[tuple[str, Call]]:
    """Every full-precision kernel that torch offers for these tensors."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def call(backend: Any) -> Tensor:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    backends = {"torch default": None, "flash": SDPBackend.FLASH_ATTENTION}
    backends |= {"cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
    for name, backend in backends.items():
        try:
            call(backend)
        except RuntimeError:
            # Not for these shapes, or not in this build.
            continue
        yield f"sdpa {name} bf16", partial(call, backend)
    grouped = query.view(query.shape[0], keys.shape[1], -1, query.shape[-1])

    def matmul() -> Tensor:
        weights = (grouped @ keys.mT * query.shape[-1] ** -0.5).softmax(-1)
        return torch.matmul(weights, values).view(query.shape)

    yield "matmul bf16", matmul


def random(*size: int, device: torch.device, seed: int) -> Tensor:
    """Gaussian bfloat16, made where it is used."""
    return torch.randn(
        size, generator=torch.Generator(device).manual_seed(seed), device=device, dtype=torch.float
    ).bfloat16()


def logits_contenders(
    batch: int, tokens: int, bits: tuple[Bits, ...], shape: Shape, device: torch.device
) -> Iterator[Timed]:
    """Inner products of one query a head with every key: from codes, and from floats."""
    queries = random(
        batch, shape.kv_heads, shape.heads // shape.kv_heads, shape.dim, device=device, seed=1
    )
    keys = random(batch, shape.kv_heads, tokens, shape.dim, device=device, seed=2)
    exact = queries.double() @ keys[:, :, :4096].double().mT

    def error(result: Tensor) -> float:
        return relative(result[..., :4096], exact)

    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        q, k = queries.to(dtype), keys.to(dtype)
        call: Call = partial(torch.matmul, q, k.mT)
        yield Timed(f"keys {name}", call, k.nbytes, error(call()))
        del k, call
    for width in bits:
        turns, factor, book = tables(shape.dim, width, device)
        rows, scales = encode(keys, turns, factor, book, bits=width, scale="unbiased")
        rotated = rotate(queries, turns, factor)
        call = partial(scores, rotated, rows, scales, book, bits=width)
        yield Timed(f"codes {width:g} bits", call, rows.nbytes + scales.nbytes, error(call()))


def relative(result: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of the exact result."""
    return float((result.double() - exact).norm() / exact.norm())


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
