"""Random pages with known contents, and attention on them in float64."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from sixfold.codebooks import centroids
from sixfold.kernels import attention
from sixfold.kernels.attention import Partial
from sixfold.kernels.types import CodeName, Coding, Pages, Pool
from sixfold.packing import (
    BITS,
    PAGE_TOKENS,
    Bits,
    Layout,
    encode_scale,
    is_paired,
    n_symbols,
    pack,
    symbol_bits,
    to_pages,
)
from sixfold.trellis import PAGE_BITS, codewords, pages_hold, path_bytes, starts
from tests.kernels import oracle

# Every width of every code.
WIDTHS: list[tuple[Bits, CodeName]] = [
    *((bits, "codebook") for bits in BITS),
    *((bits, "trellis") for bits in PAGE_BITS),
]


@dataclasses.dataclass
class Side:
    """One side of a cache: packed pages, and the vectors they stand for."""

    codes: Tensor  # uint8 [slots, kv_heads, page_bytes]
    scales: Tensor  # float16 [slots, kv_heads, 64]
    centroids: Tensor
    dense: Tensor  # float64 [slots, kv_heads, 64, dim], or [tokens, dim]
    bits: Bits
    code: CodeName = "codebook"

    @property
    def coding(self) -> Coding:
        """What attention in the rotated domain knows of it: no rotation."""
        dim = self.dense.shape[-1]
        none = torch.empty(0, 2, dim // 2), torch.empty(dim, dim)
        return Coding(*none, self.centroids, self.bits, dim, "norm", self.code)


def random_pages(
    slots: int,
    kv_heads: int,
    dim: int,
    bits: Bits,
    layout: Layout,
    generator: torch.Generator,
    code: CodeName = "codebook",
) -> Side:
    """Uniformly random symbols under random scales; decoded from the symbols, not the bytes.

    As in a cache, a trellis is for sides that have one (docs/format.md, 2b).
    """
    if code == "trellis" and pages_hold(dim, bits):
        return random_paths(slots, kv_heads, dim, bits, layout, generator)
    book = centroids(dim, bits)
    shape = slots, kv_heads, PAGE_TOKENS
    count, width = n_symbols(dim, bits), symbol_bits(bits)
    symbols = torch.randint(1 << width, (*shape, count), dtype=torch.uint8, generator=generator)
    scales = encode_scale(torch.rand(shape, generator=generator) + 0.5)
    words = book.double()[symbols.long()]
    if is_paired(bits):
        # Symbol i is the pair (i, i + ceil(dim / 2)).
        words = torch.cat([words[..., 0], words[..., 1]], -1)[..., :dim]
    codes = to_pages(pack(symbols, width), count, width, layout)
    return Side(codes, scales, book, words * scales.double()[..., None], bits)


def random_paths(
    slots: int, kv_heads: int, dim: int, bits: Bits, layout: Layout, generator: torch.Generator
) -> Side:
    """Uniformly random paths of a trellis, decoded bit by bit as docs/format.md has it."""
    book, shape = codewords(128, bits), (slots, kv_heads, PAGE_TOKENS)
    *start, count = starts(dim, bits)
    path = torch.randint(2, (*shape, count), dtype=torch.uint8, generator=generator)
    scales = encode_scale(torch.rand(shape, generator=generator) + 0.5)
    states = oracle.path_states(path, start)
    size = path_bytes(dim, bits)
    padded = torch.nn.functional.pad(path, (0, 8 * size - count)).unflatten(-1, (size, 8))
    rows = (padded << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    dense = book.double()[states] * scales.double()[..., None]
    return Side(to_pages(rows, size, 8, layout), scales, book, dense, bits, "trellis")


def page_attention(query: Tensor, *args: Any, **options: Any) -> Partial:
    """What the backend in use does with pages (`sixfold.kernels.attention.parts.PageAttention`)."""
    kernel = attention.implementation("attention", query.device)
    part: Partial = kernel.page_attention(query, *args, **options)
    return part


@dataclasses.dataclass
class Case:
    """Arguments of `page_attention`, and what they stand for in float64."""

    query: Tensor
    keys: Side
    values: Side
    table: Tensor
    lengths: Tensor
    first_token: Tensor
    options: dict[str, Any]

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def starts(self) -> Tensor:
        return self.lengths.cumsum(0) - self.lengths

    @property
    def pages(self) -> Pages:
        pool = Pool(self.keys.codes, self.keys.scales, self.values.codes, self.values.scales)
        return Pages(pool, self.table, self.starts[None], self.lengths[None], 0)

    @property
    def arguments(self) -> tuple[Tensor, Pages, Coding, Coding, Tensor]:
        """Those of `page_attention` but for the options."""
        return self.query, self.pages, self.keys.coding, self.values.coding, self.first_token

    def run(self) -> Partial:
        return page_attention(*self.arguments, **self.options)

    def dense(self, pages: Side) -> Tensor:
        """The valid tokens of every sequence, float64 [batch, kv_heads, tokens, dim]."""
        valid = (torch.arange(PAGE_TOKENS) < self.lengths[:, None]).flatten()
        return pages.dense[self.table].transpose(1, 2).flatten(2, 3)[:, :, valid]

    def expected(self, dtype: torch.dtype = torch.float64, *, half: bool = False) -> Partial:
        """Decode everything, then softmax: the oracle, or plain PyTorch at another dtype.

        `half` rounds the operands of both products to the 11 bits of float16, as a kernel for
        tensor cores does, but for float16's range.
        """
        hidden = torch.arange(self.tokens) < self.first_token[:, :, None]
        return dense_softmax(
            self.query.to(dtype),
            self.dense(self.keys).to(dtype),
            self.dense(self.values).to(dtype),
            hidden[:, None],
            logit_offset=self.options.get("logit_offset"),
            mask=self.options.get("mask"),
            softcap=self.options.get("softcap"),
            half=half,
        )

    @property
    def half_noise(self) -> float:
        """What a logit is off, at 2.5 standard deviations, when query and key have 11 bits."""
        groups = self.query.shape[1] // self.keys.codes.shape[1]
        squares = self.dense(self.keys).square().repeat_interleave(groups, 1)
        spread = (self.query.double().square() @ squares.mT).amax().sqrt()
        return 2.0**-11 * float(spread)

    @property
    def level_bias(self) -> float:
        """Most that rounding the values' codebook may shift an output by: no average removes it.

        Plain PyTorch rounds s·level anew for every token; a kernel rounds the level, alike for all.
        Symbols are uniform here, so a level's mean error δ shifts each coordinate by δ·Σ p·s, and
        scales are below 1.5. Codebooks that are symmetric have δ = 0 (rounding is odd); at 2.5
        bits pairs are mirrored in one of their two coordinates only.
        """
        book = self.values.centroids.double()
        return float((_eleven_bits(book) - book).mean(0).abs().max() * 1.5)


def make_case(
    *,
    key_bits: Bits = 4,
    value_bits: Bits | None = None,
    key_dim: int = 64,
    value_dim: int | None = None,
    batch: int = 2,
    kv_heads: int = 2,
    groups: int = 2,
    queries: int = 1,
    lengths: tuple[int, ...] = (64, 64),
    sharpness: float = 1.0,
    seed: int = 0,
    key_code: CodeName = "codebook",
    value_code: CodeName | None = None,
) -> Case:
    """A case without masks; `sharpness` is the standard deviation of the logits."""
    value_code = key_code if value_code is None else value_code
    generator = torch.Generator().manual_seed(seed)
    value_bits = key_bits if value_bits is None else value_bits
    value_dim = key_dim if value_dim is None else value_dim
    pages = len(lengths)
    slots = batch * pages + 1
    query = torch.randn(batch, kv_heads * groups, queries, key_dim, generator=generator)
    order = torch.randperm(slots, generator=generator)[: batch * pages]
    return Case(
        query * (sharpness * key_dim**-0.5),
        random_pages(slots, kv_heads, key_dim, key_bits, "key", generator, key_code),
        random_pages(slots, kv_heads, value_dim, value_bits, "value", generator, value_code),
        order.view(batch, pages),
        torch.tensor(lengths),
        torch.zeros(batch, queries, dtype=torch.int64),
        {},
    )


def resized(case: Case, key_size: float, value_size: float) -> Case:
    """The same attention with keys and values as many times as large, queries as much smaller.

    Scales become multiples of 1/64 first: all forms of `packing.encode_scale` hold these exactly.
    """
    size = {"keys": key_size, "values": value_size}
    stored = {
        name: encode_scale((getattr(case, name).scales.float() * 64).round() / 64 * size[name])
        for name in size
    }
    sides = {
        name: dataclasses.replace(getattr(case, name), scales=scales)
        for name, scales in stored.items()
    }
    return dataclasses.replace(case, query=case.query / key_size, **sides)


def dense_softmax(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    hidden: Tensor,
    *,
    logit_offset: Tensor | None = None,
    mask: Tensor | None = None,
    softcap: float | None = None,
    half: bool = False,
) -> Partial:
    """Attention by the textbook, in the dtype of `query`; nothing is shared with the kernels."""
    groups = query.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(groups, 1) for x in (keys, values))
    if half:
        query, keys, values = map(_eleven_bits, (query, keys, values))
    logits = query @ keys.mT
    if logit_offset is not None:
        logits = logits + logit_offset.to(logits.dtype)[..., None]
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    logits = logits.masked_fill(hidden, -torch.inf)
    if mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        logits = logits + mask.to(logits.dtype)
    lse = logits.logsumexp(-1)
    probabilities = (logits - lse[..., None]).exp().nan_to_num(0.0)
    if half:
        probabilities = _eleven_bits(probabilities)
    return Partial(probabilities @ values, lse)


def _eleven_bits(x: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)


def assert_accurate(got: Partial, case: Case, *, half: bool) -> None:
    """The rule, beside plain PyTorch in float32 or, if `half`, with operands of 11 bits."""
    if not half:
        assert_as_accurate(got, case.expected(torch.float32), case.expected())
        return
    # Few outputs, or few tokens that carry them, may be lucky: the noise itself comes on top.
    noise = case.half_noise + 2.0**-11
    plain = case.expected(torch.float32, half=True)
    assert_as_accurate(got, plain, case.expected(), noise=noise, bias=case.level_bias)


def assert_as_accurate(
    got: Partial, plain: Partial, exact: Partial, *, noise: float = 0.0, bias: float = 0.0
) -> None:
    """No further from the oracle than twice plain PyTorch, plus the rounding of the result."""
    assert got.out.dtype == got.lse.dtype == torch.float32
    seen = exact.lse > -torch.inf
    assert torch.equal(got.lse > -torch.inf, seen)
    assert not got.out[~seen].any(), "queries that see nothing must give zeros"
    for name in ("out", "lse"):
        ours, theirs, truth = (getattr(part, name)[seen].double() for part in (got, plain, exact))
        if truth.numel() == 0:
            continue
        slack = 4 * torch.finfo(torch.float32).eps * truth.norm()
        count = truth.numel() ** 0.5
        slack = slack + (noise * truth.norm() + bias * count if name == "out" else noise * count)
        error, allowed = (ours - truth).norm(), 2 * (theirs - truth).norm() + slack
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"
