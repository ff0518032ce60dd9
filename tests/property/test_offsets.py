"""Nothing depends on an offset: one vector added to all keys of a head changes its mean alone.

Real models add vectors sixty times as long as what tells their tokens apart (the key biases of
Qwen2.5). A layer that is fed such keys must do what it does with the same keys without the vector,
taken off exactly: so that what the dtype rounds off is the same on both sides.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sixfold.cache import CachePolicy, CompressedLayer, StaticLayer
from sixfold.cache.affine import repeats
from sixfold.kernels._dispatch import available_backends
from sixfold.kernels._native import extension
from tests.layers import Shape, feed, oracle

NO_WINDOWS = CachePolicy(sink_tokens=0, recent_window=0)

TOKENS, DIM = 300, 64
SHAPE = Shape(batch=2, kv_heads=2, groups=2, key_dim=DIM, value_dim=DIM)
# How far each dtype can still tell tokens apart beside the offset.
OFFSETS = [
    (torch.float32, 10),
    (torch.float32, 1_000),
    (torch.float32, 10_000),
    (torch.float16, 10),
    (torch.float16, 100),
    (torch.bfloat16, 10),
    (torch.bfloat16, 60),
]
WHERE = ["all heads", "one head", "some channels"]

offsets = pytest.mark.parametrize(("dtype", "size"), OFFSETS, ids=str)
where = pytest.mark.parametrize("where", WHERE)
pytestmark = pytest.mark.usefixtures("unhooked")


def kernels() -> list[Any]:
    """Every backend that runs on a CPU, and every instruction set of the compiled one."""
    cpu = extension()
    isas = [] if isinstance(cpu, str) else [f"cpu {isa}" for isa in cpu.available_isas()]
    triton = ["triton"] if "triton" in available_backends("attention") else []
    # The interpreter takes half a minute a case.
    slow = [pytest.param(name, marks=pytest.mark.slow) for name in triton]
    return ["reference", *isas, *slow]


@pytest.fixture(params=kernels())
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name, _, isa = str(request.param).partition(" ")
    monkeypatch.setenv("SIXFOLD_BACKEND", name)
    if isa:
        monkeypatch.setenv("SIXFOLD_ISA", isa)
    return name


def offset(size: float, where: str, dtype: torch.dtype) -> Tensor:
    """A vector a head, `size` times as long as a key, exact in `dtype`."""
    generator = torch.Generator().manual_seed(1)
    vector = torch.randn(2, 1, DIM, generator=generator)
    vector *= size * math.sqrt(DIM) / torch.linalg.vector_norm(vector, dim=-1, keepdim=True)
    if where == "one head":
        vector[1] = 0
    if where == "some channels":
        vector[..., 5:] = 0
    return vector.to(dtype)


def pair(
    dtype: torch.dtype, size: float, where: str
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor], Tensor]:
    """Queries, keys and values beside an offset, the same without it, and the offset."""
    query, keys, values = SHAPE.tokens(TOKENS)
    query, values = query.to(dtype), values.to(dtype)
    moved = offset(size, where, dtype)
    beside = (keys.to(dtype) + moved).to(dtype)
    plain = (beside.double() - moved.double()).float()
    return (query, beside, values), (query.float(), plain, values.float()), moved.float()


def layers(
    dtype: torch.dtype, size: float, where: str
) -> tuple[CompressedLayer, CompressedLayer, Tensor]:
    beside, plain, moved = pair(dtype, size, where)
    found = []
    for tokens in (beside, plain):
        layer = CompressedLayer(tokens[1][:, :, :0], tokens[2][:, :, :0], NO_WINDOWS)
        feed(layer, tokens, 200, 100)
        found.append(layer)
    return found[0], found[1], moved


def spread(dtype: torch.dtype, size: float) -> float:
    """What one rounding of a key in float32 is worth beside the offset, some of them together."""
    return 64 * size * torch.finfo(torch.float32).eps


@where
@offsets
def test_the_same_tokens_count(dtype: torch.dtype, size: float, where: str) -> None:
    (_, beside, _), (_, plain, _), _ = pair(dtype, size, where)
    for keys in (beside, plain):
        keys[0, :, 100:140] = keys[0, :, 100:101]
    assert torch.equal(repeats(beside), repeats(plain))
    assert repeats(beside)[0, :, 103:140].all()
    assert repeats(beside)[1].float().mean() < 0.05


@pytest.mark.parametrize("size", [0, 10, 60, 1000])
@pytest.mark.parametrize("base", [1e4, 1e6])
@pytest.mark.parametrize("part", [(0, 1), (3, 4), (7, 8), (0, 8)], ids=str)
@pytest.mark.parametrize("dim", [16, 64, 128])
def test_a_bias_that_rope_turns(part: tuple[int, int], base: float, size: float, dim: int) -> None:
    """It makes the steps of a text long and equal in some channels: no run of one token."""
    generator, pairs = torch.Generator().manual_seed(1), dim // 2
    bias = torch.zeros(2, 1, 2, pairs, dtype=torch.float64)
    where = bias[..., part[0] * pairs // 8 : part[1] * pairs // 8]
    where += torch.randn(where.shape, generator=generator).double()
    bias *= size * math.sqrt(dim) / torch.linalg.vector_norm(bias, dim=(2, 3), keepdim=True)
    text = torch.randn(2, TOKENS, 2, pairs, generator=generator).double()
    text[:, 100:140] = text[:, 100:101]
    angles = torch.arange(TOKENS)[:, None] * base ** -(torch.arange(pairs).double() / pairs)
    left, right = (text + bias).unbind(2)
    turned = left * angles.cos() - right * angles.sin(), left * angles.sin() + right * angles.cos()
    found = repeats(torch.cat(turned, -1).float()[None])
    run = torch.zeros(TOKENS, dtype=torch.bool)
    run[103:140] = True
    # A map is fitted to the others: that many are left out by chance costs little.
    assert float(found[..., ~run].float().mean()) < (0.75 if size else 0.1)
    assert float(found[..., run].float().mean()) > 0.9


@where
@offsets
@pytest.mark.usefixtures("backend")
def test_map_and_codes(dtype: torch.dtype, size: float, where: str) -> None:
    beside, plain, moved = layers(dtype, size, where)
    assert beside.prefix is not None
    assert plain.prefix is not None
    ours, theirs = beside.prefix.key_map, plain.prefix.key_map
    tolerance = 1e-4 + spread(dtype, size)
    torch.testing.assert_close(ours.mean - moved[:, 0], theirs.mean, rtol=0, atol=tolerance)
    torch.testing.assert_close(ours.scale, theirs.scale, rtol=1e-3, atol=0)
    slabs = [layer.history.runs[0] for layer in (beside, plain)]
    codes = [run.slab.pool.key_codes[run.slots] for run in slabs]
    # Where a coordinate lies on an edge the rounding of the mean decides.
    assert float((codes[0] == codes[1]).float().mean()) > 1 - 16 * tolerance
    assert torch.equal(*(run.slab.pool.value_codes[run.slots] for run in slabs))


@where
@offsets
@pytest.mark.usefixtures("backend")
def test_attention(dtype: torch.dtype, size: float, where: str) -> None:
    """Growing and static, on codes and dequantized: as far from exact as without the offset."""
    beside, plain, _ = layers(dtype, size, where)
    static = StaticLayer(beside.fork(), 2 * TOKENS)
    (query, keys, values), _, _ = pair(dtype, size, where)
    last = slice(TOKENS - 1, TOKENS)
    # One more token: a query that all codes are older than.
    new = query[:, :, last], keys[:, :, last], values[:, :, last]
    everything = torch.cat([keys, new[1]], 2), torch.cat([values, new[2]], 2)
    exact = oracle(new[0], *everything, SHAPE.key_dim**-0.5)
    static.append(new[1], new[2])
    outs = {"growing": feed(beside, new), "static": static.attend(new[0], scaling=DIM**-0.5)}
    decoded = beside.dequantized()
    plain_new = tuple(x[:, :, last] for x in pair(dtype, size, where)[1])
    allowed = _error(feed(plain, plain_new), exact)
    outs["dequantized"] = oracle(new[0], *decoded, SHAPE.key_dim**-0.5)
    for name, out in outs.items():
        # Handing out keys rounds them to the model's dtype once more, as the model did itself.
        rounding = 4 * torch.finfo(dtype).eps * (size if name == "dequantized" else 1)
        assert _error(out, exact) < 1.1 * allowed + rounding + 4 * spread(dtype, size), name


def _error(out: Tensor, exact: Tensor) -> float:
    return float((out.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("sinks", [True, False])
def test_too_few_tokens_for_a_map_never_mean_no_mean(sinks: bool) -> None:
    """A prompt of one token, with RoPE: nothing to equalize by, but a mean all the same."""
    query, _, values = SHAPE.tokens(TOKENS)
    angles = torch.arange(TOKENS)[:, None] * 10_000.0 ** (-torch.arange(DIM // 2) / (DIM // 2))
    token = torch.randn(2, 2, 1, DIM, generator=torch.Generator().manual_seed(2)) + 30
    left, right = token.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    keys = torch.cat([left * cos - right * sin, left * sin + right * cos], -1)
    layer = SHAPE.layer() if sinks else SHAPE.layer(NO_WINDOWS)
    layer.append(keys, values)
    layer.attend(query, scaling=DIM**-0.5)
    assert layer.prefix is not None
    key_map = layer.prefix.key_map
    assert torch.equal(key_map.scale, torch.ones_like(key_map.scale))
    torch.testing.assert_close(
        key_map.mean, keys[:, :, 4 if sinks else 0 :].mean(2), rtol=0.02, atol=0.2
    )


def test_sinks_stand_in_where_nothing_else_counts() -> None:
    """A sequence of three tokens, padded on the right beside a longer one."""
    query, keys, values = SHAPE.tokens(TOKENS)
    keys = keys + 100
    shown = torch.ones(2, TOKENS, dtype=torch.bool)
    shown[0, 3:] = False
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril() & shown[:, None, None, :]
    layer = SHAPE.layer()
    layer.append(keys, values)
    layer.attend(query, scaling=DIM**-0.5, mask=mask)
    assert layer.prefix is not None
    mean = layer.prefix.key_map.mean
    torch.testing.assert_close(mean[0], keys[0, :, :3].mean(1))
    # One token or two look like a run by chance.
    torch.testing.assert_close(mean[1], keys[1, :, 4:].mean(1), rtol=0, atol=0.1)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_is_not_finite_stays_in_its_head(bad: float) -> None:
    query, keys, values = SHAPE.tokens(TOKENS)
    clean, dirty = SHAPE.layer(NO_WINDOWS), SHAPE.layer(NO_WINDOWS)
    feed(clean, (query, keys, values))
    keys[:, 0, 50, 7] = bad
    feed(dirty, (query, keys, values))
    assert clean.prefix is not None
    assert dirty.prefix is not None
    for name in ("mean", "scale"):
        ours, theirs = (getattr(x.prefix.key_map, name) for x in (dirty, clean))
        assert torch.equal(ours[:, 1], theirs[:, 1])
        torch.testing.assert_close(ours[:, 0], theirs[:, 0], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("garbage", [math.nan, 1e4])
@pytest.mark.parametrize("chunks", [(300,), (100, 200)])
def test_masked_tokens_do_not_count(garbage: float, chunks: tuple[int, ...]) -> None:
    """Right padding, and holes: what a mask hides from itself says nothing about the keys."""
    query, keys, values = SHAPE.tokens(TOKENS)
    shown = torch.ones(2, TOKENS, dtype=torch.bool)
    shown[0, 60:90] = False
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    mask = causal & shown[:, None, None, :]
    maps = []
    for filling in (0.0, garbage):
        keys = keys.clone()
        keys[0, :, 60:90] = filling
        layer, start = SHAPE.layer(CachePolicy(sink_tokens=0, recent_window=128)), 0
        for part in zip(*(x.split(list(chunks), 2) for x in (query, keys, values)), strict=True):
            stop = start + part[0].shape[2]
            layer.append(part[1], part[2])
            layer.attend(part[0], scaling=DIM**-0.5, mask=mask[:, :, start:stop, :stop])
            start = stop
        assert layer.prefix is not None
        maps.append(layer.prefix.key_map)
    assert torch.equal(maps[0].mean, maps[1].mean)
    assert torch.equal(maps[0].scale, maps[1].scale)
