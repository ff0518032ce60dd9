"""Timing on machines that are shared: alternate, repeat, take the median."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds a call.

    Attributes:
        median: Half of the calls were faster.
        spread: Interquartile range over the median.
        calls: Calls timed.
    """

    median: float
    spread: float
    calls: int

    @classmethod
    def of(cls, seconds: list[float]) -> "Timing":
        """Summarize single calls."""
        median = statistics.median(seconds)
        first, _, third = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [median] * 3
        return cls(median, (third - first) / median, len(seconds))


def time_once(call: Callable[[], object]) -> float:
    """Seconds of one call, with the device's queue empty before and after."""
    _synchronize()
    start = time.perf_counter()
    call()
    _synchronize()
    return time.perf_counter() - start


def interleave(
    calls: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int = 1
) -> dict[str, Timing]:
    """Time several calls in turn, so that a slow moment of the machine hits them all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + repeats):
        for name, call in calls.items():
            elapsed = time_once(call)
            if turn >= warmup:
                seconds[name].append(elapsed)
    return {name: Timing.of(values) for name, values in seconds.items()}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
