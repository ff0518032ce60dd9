"""How contenders are timed: in turn, each after its own kind, with the error beside the time.

Machines are shared: in turn a slow moment hits all contenders alike, and quartiles show it.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to do what all contenders of a case do.

    Attributes:
        name: In the table.
        call: Timed.
        nbytes: Bytes that a call has to read and write, weights of a model left out.
        result: What `call` returned, made comparable to the exact result; None: no error is stated.
        prepare: Called before every timed call.
        lead: Called right before every timed call, after the sleep: the layer before, on tensors
            of its own, so that threads are awake and caches hold something else, as in a model.
        timed: Times itself and returns seconds (another process); `call` is then for the error.
        steps: What one call does so many of: times are per step.
        environment: Variables set while it runs.
        notes: Further columns of its row.
    """

    name: str
    call: Callable[[], Any]
    nbytes: int = 0
    result: Callable[[Any], Tensor] | None = lambda result: result
    prepare: Callable[[], object] | None = None
    lead: Callable[[], object] | None = None
    timed: Callable[[], float] | None = None
    steps: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Case:
    """Contenders for one task, and what the task's exact result is."""

    contenders: Sequence[Contender]
    exact: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Quartiles:
    """Seconds a step: a quarter of the calls were faster than `first`, half than `median`."""

    first: float
    median: float
    third: float
    calls: int

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        return (self.third - self.first) / self.median

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Quartiles":
        """Summarize calls."""
        if len(seconds) == 1:
            return cls(seconds[0], seconds[0], seconds[0], 1)
        first, median, third = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(first, median, third, len(seconds))


@dataclass(frozen=True, slots=True)
class Row:
    """One contender's result.

    Attributes:
        name: In the table.
        seconds: What its calls took, a step.
        mean: Mean of the same, which a few calls that had to wait may rule.
        error: Of what it computes.
        nbytes: Bytes that a call has to read and write.
        notes: Further columns.
    """

    name: str
    seconds: Quartiles
    mean: float
    error: float | None
    nbytes: int
    notes: Mapping[str, Any]

    @property
    def gigabytes_per_second(self) -> float:
        """Bytes that had to move over the median time."""
        return self.nbytes / self.seconds.median / 1e9

    def to_dict(self) -> dict[str, Any]:
        """The row as plain JSON values; no speed where no bytes were stated."""
        return {
            "contender": self.name,
            "seconds": asdict(self.seconds),
            "mean_seconds": self.mean,
            "error": self.error,
            "nbytes": self.nbytes,
            "gigabytes_per_second": self.gigabytes_per_second if self.nbytes else None,
            **self.notes,
        }


def measure(case: Case, *, repeats: int, settle: float = 0, warmup: int = 2) -> list[Row]:
    """Time every contender of `case` `repeats` times, in turn.

    Args:
        case: What is compared. All contenders are alive at once.
        repeats: Timed calls of each.
        settle: Seconds of sleep before every timed call and its lead. Threads of OpenMP spin for
            a few milliseconds after their work, in the way of contenders with other threads.
        warmup: Calls of each that are not counted.
    """
    seconds: list[list[float]] = [[] for _ in case.contenders]
    for turn in range(warmup + repeats):
        for index, one in enumerate(case.contenders):
            elapsed = _time(one, settle)
            if turn >= warmup:
                seconds[index].append(elapsed / one.steps)
    return [
        Row(
            one.name,
            Quartiles.of(values),
            statistics.fmean(values),
            error_of(one, case.exact),
            one.nbytes,
            one.notes,
        )
        for one, values in zip(case.contenders, seconds, strict=True)
    ]


def error_of(one: Contender, exact: Tensor | None) -> float | None:
    """The error of what a contender computes; None where none is stated."""
    if exact is None or one.result is None:
        return None
    with variables(one.environment):
        if one.prepare is not None:
            one.prepare()
        return relative_error(one.result(one.call()), exact)


def relative_error(result: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of the exact result."""
    return float((result.double() - exact).norm() / exact.norm())


def time_once(call: Callable[[], object]) -> float:
    """Seconds of one call, with the device's queue empty before and after."""
    _synchronize()
    start = time.perf_counter()
    call()
    _synchronize()
    return time.perf_counter() - start


@contextmanager
def variables(wanted: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables inside the block."""
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _time(one: Contender, settle: float) -> float:
    with variables(one.environment):
        if one.prepare is not None:
            one.prepare()
        time.sleep(settle)
        if one.lead is not None:
            one.lead()
        return time_once(one.call) if one.timed is None else one.timed()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
