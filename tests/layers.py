"""A compressed layer and its dense shadow: what any sequence of operations must amount to."""

import copy
import dataclasses

import torch
from torch import Tensor

from sixfold.cache import CachePolicy, CompressedLayer
from sixfold.cache.affine import MIN_TOKENS
from sixfold.cache.coder import Coder, coders
from sixfold.kernels import decode, encode, trellis
from sixfold.packing import PAGE_TOKENS
from tests.memory import storage_bytes

# What encodes and decodes vectors in each code.
KERNELS = {
    "codebook": (encode.encode, decode.decode),
    "trellis": (trellis.encode, trellis.decode),
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Tensor dimensions of a layer under test."""

    batch: int = 2
    kv_heads: int = 2
    groups: int = 2
    key_dim: int = 16
    value_dim: int = 32
    dtype: torch.dtype = torch.float32

    @property
    def scaling(self) -> float:
        return self.key_dim**-0.5

    def empty(self) -> tuple[Tensor, Tensor]:
        return self.tokens(0)[1:]

    def tokens(self, count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Random queries, keys and values; keys have the offsets that centring is for."""
        generator = torch.Generator().manual_seed(seed)
        query = torch.randn(
            self.batch, self.kv_heads * self.groups, count, self.key_dim, generator=generator
        )
        keys = torch.randn(self.batch, self.kv_heads, count, self.key_dim, generator=generator)
        values = torch.randn(self.batch, self.kv_heads, count, self.value_dim, generator=generator)
        offset = torch.linspace(-3, 3, self.key_dim)
        return query.to(self.dtype), (keys + offset).to(self.dtype), values.to(self.dtype)

    def layer(
        self, policy: CachePolicy | None = None, sliding_window: int | None = None
    ) -> CompressedLayer:
        return CompressedLayer(*self.empty(), policy or CachePolicy(), sliding_window)


def recode(coder: Coder, x: Tensor, mean: Tensor | None, scale: Tensor | None) -> Tensor:
    """What the codes of `x` stand for, by the vector quantizer's kernels: no pages anywhere."""
    mapped = x.float() if mean is None else x.float() - mean[:, :, None]
    mapped = mapped if scale is None else mapped * scale[:, :, None]
    tables = coder.tables(x.device)
    kind = "unbiased" if coder.layout == "key" else "optimal"
    coded, decoded = KERNELS[coder.code]
    codes, scales = coded(mapped, *tables, bits=coder.bits, scale=kind)
    found = decoded(codes, scales, *tables, dim=coder.dim, bits=coder.bits)
    found = found if scale is None else found / scale[:, :, None]
    found = found if mean is None else found + mean[:, :, None]
    return found.to(x.dtype)


def oracle(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """Causal attention of the last queries in float64; `mask` hides further tokens."""
    groups = query.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(groups, 1) for x in (keys, values))
    logits = query.double() @ keys.mT * scaling
    tokens, queries = keys.shape[2], query.shape[2]
    own, all_ = torch.arange(tokens - queries, tokens)[:, None], torch.arange(tokens)
    seen = all_ <= own
    if sliding_window is not None:
        seen = seen & (all_ > own - sliding_window)
    if mask is not None:
        seen = seen & mask
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    return weights @ values


def padding_mask(padding: Tensor, queries: int, tokens: int) -> Tensor:
    """Causal mask [batch, 1, queries, tokens] that hides `padding` tokens on the left."""
    own, all_ = torch.arange(tokens - queries, tokens)[:, None], torch.arange(tokens)
    return (all_ <= own) & (all_ >= padding[:, None, None, None])


def feed(layer: CompressedLayer, tokens: tuple[Tensor, Tensor, Tensor], *chunks: int) -> Tensor:
    """Append and attend, in chunks of these sizes (one by default); the outputs in order."""
    outs = []
    sizes = chunks or (tokens[0].shape[2],)
    parts = zip(*(x.split(sizes, 2) for x in tokens), strict=True)
    for query, keys, values in parts:
        layer.append(keys, values)
        outs.append(layer.attend(query, scaling=query.shape[-1] ** -0.5))
    return torch.cat(outs, 2)


class Shadow:
    """The dense twin of a `CompressedLayer`: the same operations on plain tensors.

    Keeps what `dequantized` has to return. Tokens that become codes are encoded and decoded as
    single vectors; later operations only cut, copy and reorder.
    """

    def __init__(self, shape: Shape, policy: CachePolicy, sliding_window: int | None) -> None:
        self.shape = shape
        self.policy = policy
        self.sliding_window = sliding_window
        self.key_coder, self.value_coder = coders(policy, shape.key_dim, shape.value_dim)
        self.reset()

    def reset(self) -> None:
        self.keys, self.values = self.shape.empty()
        self.length = 0
        self.coded = 0
        self.page_lengths: list[int] = []
        self.sinks: int | None = None  # leading tokens that stay exact, once anything is coded

    @property
    def held(self) -> int:
        return self.keys.shape[2]

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.keys = torch.cat([self.keys, keys], 2)
        self.values = torch.cat([self.values, values], 2)
        self.length += keys.shape[2]

    def follow(self, layer: CompressedLayer, record_past: bool = False) -> None:
        """Compress as the documentation says; only the key map is taken from `layer`."""
        if not record_past:
            self.evict()
        sinks = 0 if self.sliding_window else self.policy.sink_tokens
        pages = (self.held - self.coded - self.policy.recent_window) // PAGE_TOKENS
        if pages <= 0 or (self.sinks is None and self.length < sinks + MIN_TOKENS):
            return
        assert layer.prefix is not None
        if self.sinks is None:
            self.sinks = sinks
        span = slice(self.coded, self.coded + pages * PAGE_TOKENS)
        key_map = layer.prefix.key_map
        keys = recode(self.key_coder, self.keys[:, :, span], key_map.mean, key_map.scale)
        values = recode(self.value_coder, self.values[:, :, span], None, None)
        exact = min(max(self.sinks - span.start, 0), pages * PAGE_TOKENS)
        self.keys = self.keys.clone()
        self.values = self.values.clone()
        self.keys[:, :, span.start + exact : span.stop] = keys[:, :, exact:]
        self.values[:, :, span.start + exact : span.stop] = values[:, :, exact:]
        self.coded = span.stop
        self.page_lengths += [PAGE_TOKENS] * pages

    def evict(self) -> None:
        """Whole expired pages go; single tokens only when no page is left."""
        if self.sliding_window is None:
            return
        expired = self.held - (self.sliding_window - 1)
        gone = 0
        while self.page_lengths and gone + self.page_lengths[0] <= expired:
            gone += self.page_lengths.pop(0)
        self.coded -= gone
        if not self.page_lengths:
            gone = max(expired, gone)
        self.keys, self.values = self.keys[:, :, gone:], self.values[:, :, gone:]

    def crop(self, count: int) -> None:
        if count >= self.length:
            self.reset()
            return
        left = self.held - count
        self.keys, self.values = self.keys[:, :, :left], self.values[:, :, :left]
        self.length -= count
        self.sinks = None if self.sinks is None else min(self.sinks, left)
        self.coded = min(self.coded, left)
        while self.page_lengths and sum(self.page_lengths) > self.coded:
            spare = sum(self.page_lengths) - self.coded
            last = self.page_lengths.pop()
            if last > spare:
                self.page_lengths.append(last - spare)
        self.evict()

    def select(self, rows: Tensor) -> None:
        self.keys, self.values = self.keys[rows], self.values[rows]
        self.shape = dataclasses.replace(self.shape, batch=len(rows))

    def fork(self) -> "Shadow":
        twin = copy.copy(self)
        twin.page_lengths = list(self.page_lengths)
        return twin


def filled(
    tokens: int = 300,
    policy: CachePolicy | None = None,
    shape: Shape | None = None,
    sliding_window: int | None = None,
) -> CompressedLayer:
    shape = shape or Shape()
    layer = shape.layer(policy, sliding_window)
    feed(layer, shape.tokens(tokens))
    return layer


def nbytes(layer: CompressedLayer) -> int:
    return storage_bytes(layer.tensors())


def pages(layer: CompressedLayer) -> list[Tensor]:
    """Codes and scales in token order, [batch, pages, ...] each."""
    runs = layer.history.runs
    return [torch.cat([run.slab.pool[i][run.slots] for run in runs], 1) for i in range(4)]


def attends_like(
    layer: CompressedLayer, keys: Tensor, values: Tensor, new: tuple[Tensor, Tensor, Tensor]
) -> None:
    """`new` tokens after a history of `keys` and `values` give float64's attention output."""
    expected = oracle(
        new[0],
        torch.cat([keys, new[1]], 2),
        torch.cat([values, new[2]], 2),
        keys.shape[-1] ** -0.5,
        sliding_window=layer.sliding_window,
    )
    torch.testing.assert_close(feed(layer, new).double(), expected, rtol=1e-4, atol=1e-5)


def padded(
    padding: list[int], tokens: int = 220, garbage: float = 50.0
) -> tuple[CompressedLayer, tuple[Tensor, Tensor, Tensor]]:
    """A left-padded prefill; the padding holds `garbage`."""
    shape = Shape(batch=len(padding))
    query, keys, values = shape.tokens(tokens)
    for row, count in enumerate(padding):
        for x in (query, keys, values):
            x[row, :, :count] = garbage
    layer = shape.layer()
    layer.append(keys, values)
    mask = padding_mask(torch.tensor(padding), tokens, tokens)
    layer.attend(query, scaling=shape.scaling, mask=mask)
    return layer, (query, keys, values)
