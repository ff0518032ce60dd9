"""Whatever a signal interrupts, a layer is as it was before the operation or as it is after it."""

import sys
import weakref
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

import sixfold
import sixfold.cache
from sixfold.cache import CachePolicy, CompressedLayer
from sixfold.integrations.transformers.keyword import cache_argument
from tests.layers import Shape, feed
from tests.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("unhooked", "exact_arithmetic")

WATCHED = str(Path(sixfold.cache.__file__).parent)
PACKAGE = str(Path(sixfold.__file__).parent)
SHAPE = Shape()
# A page is due, and a window has moved on, with the tokens that come next.
HELD, NEW = 187, 5
NEXT = SHAPE.tokens(NEW, 1)


class Signal(BaseException):
    """What a handler of Python's raises, between any two lines."""


def interrupted(
    operation: Callable[[CompressedLayer], Any], layer: CompressedLayer, line: int
) -> bool:
    """Run an operation, and raise before a line of the cache; whether it has so many."""
    passed = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal passed
        if not frame.f_code.co_filename.startswith(WATCHED):
            return None
        if event == "line":
            passed += 1
            if passed == line:
                raise Signal
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        operation(layer)
    except Signal:
        return True
    finally:
        sys.settrace(before)
    return False


def attend(layer: CompressedLayer) -> None:
    feed(layer, NEXT)


OPERATIONS: dict[str, Callable[[CompressedLayer], Any]] = {
    "attend": attend,
    "crop to the window": lambda layer: layer.crop(3),
    "crop into pages": lambda layer: layer.crop(100),
    "reset": lambda layer: layer.reset(),
    "reorder": lambda layer: layer.select(torch.tensor([1, 0])),
    "select": lambda layer: layer.select(torch.tensor([1])),
    "move": lambda layer: layer.to(torch.device("cpu"), torch.float64),
    "fork": lambda layer: layer.fork(),
}


def held(layer: CompressedLayer) -> tuple[int, int, Tensor, Tensor]:
    keys, values = layer.dequantized()
    return layer.length, len(layer.padding), keys, values


def alike(layer: CompressedLayer, other: CompressedLayer) -> bool:
    (*mine, keys, values), (*theirs, other_keys, other_values) = held(layer), held(other)
    if mine != theirs or keys.shape != other_keys.shape or values.shape != other_values.shape:
        return False
    # The same tokens, in codes of 8 bits or not yet.
    pairs = ((keys, other_keys), (values, other_values))
    return all(float((a - b).norm()) < 0.02 * float(b.norm()) + 1e-9 for a, b in pairs)


@pytest.mark.parametrize("sliding_window", [None, 100], ids=["all", "sliding"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_interrupt_anywhere(name: str, sliding_window: int | None) -> None:
    begun = SHAPE.layer(CachePolicy(8, fit_tokens=0), sliding_window)
    begun.record_past = name.startswith("crop")
    feed(begun, SHAPE.tokens(HELD))
    operation = OPERATIONS[name]
    operation(done := begun.fork())
    appended = begun.fork()
    appended.append(*NEXT[1:])
    ends = [begun, done, *([appended] if name == "attend" else [])]
    outcomes = []
    while interrupted(operation, layer := begun.fork(), len(outcomes) + 1):
        outcomes.append(next((i for i, end in enumerate(ends) if alike(layer, end)), "neither"))
        # It can be used all the same.
        feed(layer, tuple(x[: len(layer.padding)].to(layer.window.keys.dtype) for x in NEXT))
    assert "neither" not in outcomes
    assert 0 in outcomes


def everything() -> None:
    """A little of all that makes tensors which outlive the call."""
    layer = SHAPE.layer(CachePolicy(4, fit_tokens=0))
    feed(layer, SHAPE.tokens(HELD))
    for _ in range(20):
        feed(layer, SHAPE.tokens(NEW))
    feed(layer.fork(), NEXT)
    model = tiny_model()
    cache = sixfold.TurboQuantCache.for_model(model)
    model(torch.arange(2, 300)[None], **cache_argument(cache))
    cache.static(400)
    sixfold.TurboQuantCache.for_model(model, key_map=cache.key_maps())
    # Of tables that nobody has made before.
    sixfold.TurboQuantMSE(32, 3, seed=next(SEEDS)).encode(torch.randn(100, 32))
    index = sixfold.Index(32)
    index.add(torch.randn(100, 32))
    index.search(torch.randn(3, 32), 5)


SEEDS = count(10**6)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_handler_runs_without_gradients_where_its_caller_does(mode: Any) -> None:
    on = set()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line" and torch.is_grad_enabled():
            on.add(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return trace

    before = sys.gettrace()
    try:
        with mode():
            sys.settrace(trace)
            everything()
    finally:
        sys.settrace(before)
    assert not on


def test_no_python_runs_when_something_goes() -> None:
    """What a signal handler raises in a destructor, or in what a weak reference calls, is lost."""
    layer = SHAPE.layer(CachePolicy(4, fit_tokens=0))
    feed(layer, SHAPE.tokens(HELD))
    index = sixfold.Index(32)
    index.add(torch.randn(100, 32))
    gone = [weakref.ref(layer), weakref.ref(index)]
    calls = []
    before = sys.getprofile()
    sys.setprofile(lambda frame, event, _: event == "call" and calls.append(frame.f_code))
    try:
        del layer, index
    finally:
        sys.setprofile(before)
    assert not calls
    assert [x() for x in gone] == [None, None]
