"""Attention over all a layer holds: the compiled kernel against the reference."""

import dataclasses
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from sixfold.cache import CachePolicy, CompressedLayer
from sixfold.cache.pages import Run, Slab
from sixfold.errors import SixfoldError
from sixfold.kernels._dispatch import available_backends
from sixfold.kernels.attention import attention
from sixfold.kernels.types import CodeName, Coding, Past, Softmax, Tokens
from sixfold.packing import Bits
from sixfold.trellis import PAGE_BITS
from tests.layers import pages as layer_pages
from tests.threads import on_threads

pytestmark = pytest.mark.skipif(
    "cpu" not in available_backends("attention"), reason="no compiled extension"
)

HEADS, KV_HEADS = 6, 2
CODES = get_args(CodeName)


@dataclasses.dataclass
class Held:
    """A compressed layer, and the arguments that attend on it."""

    layer: CompressedLayer
    dims: tuple[int, int]
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        tokens: int,
        *,
        dims: tuple[int, int] = (64, 48),
        dtype: torch.dtype = torch.float32,
        sinks: int = 4,
        window: int = 40,
        batch: int = 2,
        bits: Bits = 4,
        code: CodeName = "codebook",
    ) -> "Held":
        """Two growths, so that pages lie in two slabs; the second sequence is padded."""
        random = torch.Generator().manual_seed(tokens)

        def numbers(heads: int, count: int, dim: int) -> Tensor:
            x = torch.randn(batch, heads, count, dim, generator=random)
            return (x + torch.linspace(-2, 2, dim)).to(dtype)

        policy = CachePolicy(bits, bits, sink_tokens=sinks, recent_window=window, code=code)
        keys, values = numbers(KV_HEADS, tokens, dims[0]), numbers(KV_HEADS, tokens, dims[1])
        layer = CompressedLayer(keys, values, policy)
        mask = torch.ones(batch, 1, tokens // 2, tokens // 2, dtype=torch.bool).tril()
        mask[1:, :, :, :3] = False
        for chunk, chunk_mask in (
            (slice(0, tokens // 2), mask),
            (slice(tokens // 2, tokens), None),
        ):
            query = numbers(HEADS, keys[:, :, chunk].shape[2], dims[0])
            layer.append(keys[:, :, chunk], values[:, :, chunk])
            layer.attend(query, scaling=0.1, mask=chunk_mask)
        return cls(layer, dims, dtype)

    def queries(self, count: int) -> Tensor:
        random = torch.Generator().manual_seed(count)
        batch = len(self.layer.padding)
        x = torch.randn(batch, HEADS, count, self.dims[0], generator=random)
        return 2 * x.to(self.dtype)

    def call(self, query: Tensor) -> "Call":
        """As `CompressedLayer.attend` does; the queries are those of the last tokens held."""
        layer, prefix = self.layer, self.layer.prefix
        assert prefix is not None
        first = torch.full_like(prefix.end, layer.history.tokens)
        return Call(
            query,
            Tokens(layer.window.keys, layer.window.values, first, prefix.end),
            Past.of(layer.history.parts, prefix.key_map, prefix.end, prefix.part),
            [coder.coding(query.device) for coder in (layer.code.keys, layer.code.values)],
            torch.full_like(layer.padding, layer.held - query.shape[2]),
            Softmax(self.dims[0] ** -0.5),
        )

    def attend(self, query: Tensor, pages: Any = None, **options: Any) -> Tensor:
        """That, with other pages or options."""
        call = self.call(query)
        if pages is not None:
            call.past = call.past._replace(pages=pages)
        call.softmax = call.softmax._replace(**options)
        return call()


@dataclasses.dataclass
class Call:
    """One call of attention, whose arguments may be replaced."""

    query: Tensor
    tokens: Tokens
    past: Past
    codings: list[Coding]
    position: Tensor
    softmax: Softmax

    def __call__(self) -> Tensor:
        out: Tensor = attention(
            self.query, [self.tokens], self.past, *self.codings, self.position, self.softmax
        )
        return out


def both(
    held: Held, query: Tensor, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[Tensor, Tensor]:
    """The kernel's output, with its exact arithmetic, and the reference's."""
    monkeypatch.setenv("SIXFOLD_CPU_EXACT", "1")
    monkeypatch.setenv("SIXFOLD_BACKEND", "cpu")
    found = held.attend(query, **options)
    monkeypatch.setenv("SIXFOLD_BACKEND", "reference")
    return found, held.attend(query, **options)


def random_mask(held: Held, queries: int, kind: str) -> Tensor:
    random = torch.Generator().manual_seed(7)
    shape = len(held.layer.padding), 1, queries, held.layer.held
    seen = torch.rand(shape, generator=random) < 0.7
    seen[0, :, 0] = False  # sees nothing at all
    if kind == "bool":
        return seen
    bias = torch.randn(shape, generator=random).masked_fill(~seen, -torch.inf)
    if kind == "lowest":
        return bias.clamp(min=torch.finfo(torch.float32).min)
    return bias.to(torch.bfloat16)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"sliding_window": 90},
    {"sliding_window": 20},
    {"softcap": 3.0},
    {"sink_logits": torch.linspace(-2, 4, HEADS)},
    {"mask": "bool"},
    {"mask": "lowest", "softcap": 5.0, "sink_logits": torch.zeros(HEADS)},
    {"mask": "bfloat16"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("code", CODES)
def test_kernel_is_the_reference(
    code: CodeName, queries: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held.of(300, code=code)
    assert len(held.layer.history.runs) > 1
    query = held.queries(queries)
    if "mask" in options:
        options = {**options, "mask": random_mask(held, queries, options["mask"])}
    found, expected = both(held, query, monkeypatch, **options)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dims", [(64, 64), (80, 33), (20, 128), (7, 1)])
@pytest.mark.parametrize("code", CODES)
def test_every_dtype_and_dim(
    code: CodeName, dims: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held.of(200, dims=dims, dtype=dtype, code=code)
    found, expected = both(held, held.queries(2), monkeypatch)
    assert found.dtype is dtype
    # Both round the same float32 number, but for its own error, to the dtype.
    tolerance = max(2e-5, torch.finfo(dtype).eps)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=2e-5)


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("window", [0, 1, 63, 150])
def test_parts_may_be_empty(sinks: int, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held.of(256, sinks=sinks, window=window)
    found, expected = both(held, held.queries(1), monkeypatch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("bits", "code"),
    [
        *((bits, "codebook") for bits in (1, 2.5, 3.5, 8)),
        *((bits, "trellis") for bits in PAGE_BITS),
    ],
)
def test_integer_arithmetic_stays_close(
    bits: float, code: CodeName, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held.of(300, bits=bits, code=code)
    _, expected = both(held, held.queries(1), monkeypatch)
    monkeypatch.setenv("SIXFOLD_CPU_EXACT", "0")
    monkeypatch.setenv("SIXFOLD_BACKEND", "cpu")
    fast = held.attend(held.queries(1))
    assert (fast - expected).norm() < 0.02 * expected.norm()


def test_a_token_that_is_no_number_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held.of(300)
    held.layer.history.runs[0].slab.pool.value_scales[0, 0, 10] = torch.nan
    found, expected = both(held, held.queries(1), monkeypatch)
    assert torch.equal(found.isnan(), expected.isnan())
    assert found.isnan().any()
    assert not found.isnan().all()


@pytest.mark.parametrize("code", CODES)
def test_threads_do_not_change_the_output(code: CodeName, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held.of(2_000, batch=1, code=code)
    query = held.queries(1)
    monkeypatch.setenv("SIXFOLD_BACKEND", "cpu")
    found = on_threads(lambda: held.attend(query), 1, 2, 3)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("queries", [1, 3])
def test_pools_do_not_change_the_output(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held.of(2_000)
    runs, query = held.layer.history.runs, held.queries(queries)
    assert len(runs) > 1
    monkeypatch.setenv("SIXFOLD_BACKEND", "cpu")
    found = held.attend(query)
    codes = [x.flatten(0, 1).contiguous() for x in layer_pages(held.layer)]
    table = torch.arange(len(codes[0])).view(len(runs[0].slots), -1)
    lengths = torch.cat([run.lengths for run in runs])
    held.layer.history.runs = [Run.of(Slab.full(codes), table, lengths)]
    assert torch.equal(held.attend(query), found)


def test_gradients_come_from_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held.of(200)
    monkeypatch.setenv("SIXFOLD_BACKEND", "reference")
    expected = held.queries(1).requires_grad_()
    held.attend(expected).sum().backward()
    monkeypatch.setenv("SIXFOLD_BACKEND", "cpu")
    query = held.queries(1).requires_grad_()
    held.attend(query).sum().backward()
    assert query.grad is not None
    assert expected.grad is not None
    torch.testing.assert_close(query.grad, expected.grad)


def test_tables_that_lead_outside_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held.of(300)
    monkeypatch.setenv("SIXFOLD_BACKEND", "cpu")
    query, pages = held.queries(1), held.layer.history.parts
    pool = pages[0].pool
    beyond = pages[0].slots.clone()
    beyond[0, 0] = len(pool.key_codes)
    with pytest.raises(SixfoldError, match=r"pages\.slots"):
        held.attend(query, pages=[pages[0]._replace(slots=beyond)])
    with pytest.raises(SixfoldError, match="lengths"):
        held.attend(query, pages=[pages[0]._replace(lengths=pages[0].lengths + 1)])
    narrow = torch.ones(1, 1, 1, held.layer.held - 1, dtype=torch.bool)
    with pytest.raises(SixfoldError, match="mask"):
        held.attend(query, mask=narrow)
    wrong = pool._replace(key_scales=pool.key_scales.float())
    with pytest.raises(SixfoldError, match="key_scales"):
        held.attend(query, pages=[pages[0]._replace(pool=wrong)])
