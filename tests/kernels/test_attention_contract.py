"""What attention over a layer refuses, and what it computes, is the same on every backend."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sixfold.errors import ShapeError, SixfoldError
from sixfold.kernels._dispatch import available_backends
from sixfold.kernels.types import Past
from tests.kernels.test_attention_layers import HEADS, Call, Held

# Users have no shape checks either.
pytestmark = pytest.mark.usefixtures("unhooked")

# Triton runs in its interpreter here.
BACKENDS = [
    pytest.param(name, marks=pytest.mark.slow) if name == "triton" else name
    for name in available_backends("attention")
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name = str(request.param)
    monkeypatch.setenv("SIXFOLD_BACKEND", name)
    monkeypatch.setenv("SIXFOLD_CPU_EXACT", "1")
    return name


def call_of() -> Call:
    held = Held.of(300)
    return held.call(held.queries(1))


def without_position(call: Call) -> None:
    call.position = None  # type: ignore[assignment]


def a_head_too_few(call: Call) -> None:
    call.tokens = call.tokens._replace(keys=call.tokens.keys[:, :1])


def a_sequence_too_few(call: Call) -> None:
    call.tokens = call.tokens._replace(keys=call.tokens.keys[:1], values=call.tokens.values[:1])


WRONG: dict[str, tuple[Callable[[Call], Any], str]] = {
    "no position": (without_position, "position"),
    "no first": (lambda c: setattr(c, "tokens", c.tokens._replace(first=None)), "first"),
    "no start": (lambda c: setattr(c, "tokens", c.tokens._replace(start=None)), "start"),
    "no start of pages": (lambda c: setattr(c, "past", c.past._replace(start=None)), "start"),
    "heads": (a_head_too_few, "tokens.keys"),
    "sequences": (a_sequence_too_few, "tokens"),
    "positions": (lambda c: setattr(c, "position", c.position.float()), "position"),
    "one of two positions": (lambda c: setattr(c, "position", c.position[:1]), "position"),
    "sinks": (
        lambda c: setattr(c, "softmax", c.softmax._replace(sink_logits=torch.zeros(1))),
        "sink_logits",
    ),
    "slots": (
        lambda c: setattr(c, "tokens", c.tokens._replace(slots=torch.zeros(1, dtype=torch.int64))),
        "slots",
    ),
    **{
        f"window of {window!r}": (
            lambda c, window=window: setattr(  # type: ignore[misc]
                c, "softmax", c.softmax._replace(sliding_window=window)
            ),
            "sliding_window",
        )
        for window in (0, -3, 2.5, float("nan"), {}, True)
    },
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(name: str, backend: str) -> None:
    change, argument = WRONG[name]
    call = call_of()
    call()
    change(call)
    with pytest.raises(SixfoldError, match=argument):
        call()


@pytest.mark.parametrize("field", ["key_scales", "value_scales"])
@pytest.mark.parametrize("columns", [1, 32])
def test_pools_of_fewer_scales_than_tokens_are_refused(
    field: str, columns: int, backend: str
) -> None:
    call = call_of()
    (part, *others), pool = call.past.pages, call.past.pages[0].pool
    narrow = pool._replace(**{field: getattr(pool, field)[..., :columns].contiguous()})
    call.past = call.past._replace(pages=[part._replace(pool=narrow), *others], memo={})
    with pytest.raises(ShapeError, match="pages"):
        call()


def test_positions_of_32_bits(backend: str) -> None:
    call = call_of()
    expected = call()
    call.position = call.position.int()
    assert torch.equal(call(), expected)


@pytest.mark.parametrize("softcap", [50.0, 1e3, 1e5, 1e7, 1e9, 2.0**31, 2.0**60])
def test_soft_caps_of_any_size(softcap: float, backend: str) -> None:
    call = call_of()
    call.query = 10 * call.query
    free = call()
    call.softmax = call.softmax._replace(softcap=softcap)
    found = call()
    if softcap >= 1e5:
        # It moves a logit x by x³ / (3·softcap²).
        tolerance = 1e-3 if backend == "triton" else 1e-5
        torch.testing.assert_close(found, free, rtol=tolerance, atol=tolerance)
    else:
        assert not torch.equal(found, free)


@pytest.mark.parametrize("change", ["shorter", "other", "no sinks"])
def test_lists_of_what_is_held_may_change(change: str, backend: str) -> None:
    call = call_of()
    pages, kept = list(call.past.pages), list(call.past.kept)
    call.past = Past.of(pages, call.past.key_map, call.past.start, kept)
    before = call()
    if change == "shorter":
        pages.pop()
    elif change == "other":
        pages[0] = pages[0]._replace(lengths=pages[0].lengths // 2)
    else:
        kept.clear()
    found = call()
    assert not torch.allclose(found, before)
    call.past = Past.of(pages, call.past.key_map, call.past.start, kept)
    assert torch.equal(call(), found)


@pytest.mark.parametrize("leaf", ["query", "keys", "mean", "scale", "sinks"])
def test_gradients_reach_whatever_wants_one(leaf: str, backend: str) -> None:
    call = call_of()
    if leaf == "query":
        x = call.query = call.query.requires_grad_()
    elif leaf == "keys":
        x = call.tokens.keys.clone().requires_grad_()
        call.tokens = call.tokens._replace(keys=x)
    elif leaf == "sinks":
        x = torch.zeros(HEADS, requires_grad=True)
        call.softmax = call.softmax._replace(sink_logits=x)
    else:
        x = getattr(call.past.key_map, leaf).clone().requires_grad_()
        key_map = call.past.key_map._replace(**{leaf: x})
        call.past = Past.of(call.past.pages, key_map, call.past.start, call.past.kept)
    call().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad.any()
