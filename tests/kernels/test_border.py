"""What callers may pass to kernels: lazy tensors, odd soft-caps, tensors that move."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sixfold import TurboQuantMSE
from sixfold.cache.pages import Run, Slab
from sixfold.errors import ShapeError, SixfoldError
from sixfold.kernels._dispatch import available_backends
from sixfold.kernels.attention import exact_attention
from sixfold.kernels.rotate import rotate
from sixfold.rotation import Rotation
from tests.layers import Shape, feed

CPU = torch.device("cpu")
SHAPE = Shape(batch=1)


@pytest.fixture(autouse=True, params=["reference", "cpu", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param not in available_backends("attention"):
        pytest.skip(f"no {request.param} backend")
    if request.param == "triton" and torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    monkeypatch.setenv("SIXFOLD_BACKEND", request.param)
    return request.param


def lazy(x: Tensor) -> Tensor:
    """Equal numbers, whose memory holds the opposite ones."""
    return torch._neg_view(-x)


def test_negative_views_are_read_with_their_sign() -> None:
    x = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0))
    quantizer = TurboQuantMSE(64, 4)
    codes, expected = quantizer.encode(lazy(x)), quantizer.encode(x)
    assert torch.equal(codes.packed, expected.packed)
    assert torch.equal(quantizer.scores(lazy(x), codes), quantizer.scores(x, expected))
    turns, factor = Rotation(64).turns(CPU), Rotation(64).factor(CPU)
    assert torch.equal(rotate(lazy(x), turns, factor), rotate(x, turns, factor))


def test_imaginary_parts_of_conjugates_are_such_views() -> None:
    x = torch.randn(2, 64, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    quantizer = TurboQuantMSE(64, 4)
    imaginary = x.conj().imag
    assert imaginary.is_neg()
    expected = quantizer.encode(imaginary.clone().contiguous().resolve_neg())
    assert torch.equal(quantizer.encode(imaginary).packed, expected.packed)


def test_zero_tensors_are_zeros() -> None:
    quantizer = TurboQuantMSE(64, 4)
    zeros = torch._efficientzerotensor((2, 64))
    assert torch.equal(quantizer.decode(quantizer.encode(zeros)), torch.zeros(2, 64))


@pytest.mark.parametrize("which", ["query", "keys", "values"])
def test_the_first_attention_takes_zero_tensors(which: str) -> None:
    """PyTorch's own would read memory that they do not have."""
    tokens = dict(zip(("query", "keys", "values"), SHAPE.tokens(150), strict=True))
    found = []
    for zeros in (torch.zeros, torch._efficientzerotensor):
        layer, given = SHAPE.layer(), {**tokens, which: zeros(tokens[which].shape)}
        layer.append(given["keys"], given["values"])
        found.append(layer.attend(given["query"], scaling=SHAPE.scaling))
    torch.testing.assert_close(*found)


def test_layers_take_lazy_tensors() -> None:
    tokens = SHAPE.tokens(150)
    expected = feed(SHAPE.layer(), tokens, 147, 1, 2)
    layer, found = SHAPE.layer(), []
    for query, keys, values in zip(*(x.split([147, 1, 2], 2) for x in tokens), strict=True):
        layer.append(lazy(keys), lazy(values))
        found.append(layer.attend(lazy(query), scaling=SHAPE.scaling))
    torch.testing.assert_close(torch.cat(found, 2), expected)


@pytest.mark.parametrize("softcap", [math.inf, 1e39])
def test_a_soft_cap_that_caps_nothing_is_none(softcap: float) -> None:
    tokens = SHAPE.tokens(151)
    first, last = [x[:, :, :150] for x in tokens], [x[:, :, 150:] for x in tokens]
    found = []
    for cap in (None, softcap):
        layer = SHAPE.layer()
        feed(layer, tuple(first))
        layer.append(*last[1:])
        found.append(layer.attend(last[0], scaling=SHAPE.scaling, softcap=cap))
    assert torch.equal(*found)
    exact = [exact_attention(*tokens, scaling=0.1, softcap=cap) for cap in (None, softcap)]
    assert torch.equal(*exact)


@pytest.mark.parametrize("softcap", [math.nan, 0.0, -1.0, -math.inf])
def test_a_soft_cap_that_is_none_is_refused(softcap: float) -> None:
    layer = SHAPE.layer()
    feed(layer, SHAPE.tokens(150))
    query, keys, values = SHAPE.tokens(1)
    layer.append(keys, values)
    with pytest.raises(SixfoldError, match="softcap"):
        layer.attend(query, scaling=0.1, softcap=softcap)


def test_tensors_may_move_between_calls() -> None:
    layer, twin = SHAPE.layer(), SHAPE.layer()
    for one in (layer, twin):
        feed(one, SHAPE.tokens(200), 199, 1)
    run = layer.history.runs[0]
    before = run.slab.pool.key_codes.data_ptr()
    for x in (*run.slab.pool, run.slots, run.starts, run.lengths):
        old = x.clone()
        x.share_memory_()
        assert torch.equal(x, old)
    assert run.slab.pool.key_codes.data_ptr() != before
    # What the old memory may become, once something else has it.
    held = [torch.full_like(run.slab.pool.key_codes, 255) for _ in range(8)]
    run.slab.pool.key_codes.bitwise_not_()
    twin.history.runs[0].slab.pool.key_codes.bitwise_not_()
    tokens = SHAPE.tokens(1, seed=3)
    assert torch.equal(feed(layer, tokens), feed(twin, tokens))
    assert held


def test_tables_that_lead_outside_are_shape_errors(backend: str) -> None:
    if backend != "cpu":
        pytest.skip("others check elsewhere")
    layer = SHAPE.layer()
    feed(layer, SHAPE.tokens(200))
    run = layer.history.runs[0]
    options: dict[str, Any] = {"scaling": 0.1}
    query, keys, values = SHAPE.tokens(1)
    layer.append(keys, values)
    run.slots[0, 0] = 10_000
    with pytest.raises(ShapeError, match=r"pages\.slots"):
        layer.attend(query, **options)
    run.slots[0, 0] = 0
    cut = run.slab.pool._replace(key_codes=run.slab.pool.key_codes[..., :-4].contiguous())
    layer.history.runs = (Run.of(Slab.full(cut), run.slots, run.lengths),)
    with pytest.raises(ShapeError, match="key_codes"):
        layer.attend(query, **options)
