"""Memory measured from outside: what objects hold, and what an operation allocates."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def reachable_tensors(*roots: Any) -> list[Tensor]:
    """Every tensor that attributes, slots and containers lead to; weak references do not count."""
    found, seen, queue = [], set(), list(roots)
    while queue:
        item = queue.pop()
        if id(item) in seen or isinstance(item, (type, str, bytes, weakref.ref, weakref.WeakSet)):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            found.append(item)
        queue += _children(item)
    return found


def _children(item: Any) -> Iterable[Any]:
    if isinstance(item, dict):
        return [*item.keys(), *item.values()]
    if isinstance(item, (list, tuple, set, frozenset)):
        return list(item)
    slots = [name for kind in type(item).__mro__ for name in getattr(kind, "__slots__", ())]
    values = [getattr(item, name, None) for name in slots] if not isinstance(item, Tensor) else []
    return [*values, *getattr(item, "__dict__", {}).values()]


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind `tensors`, shared memory once."""
    storages = [x.untyped_storage() for x in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in storages if s.nbytes()}.values())


def peak_allocation(operation: Callable[[], Any]) -> int:
    """Largest number of bytes by which `operation` raises what torch's CPU allocator has given out.

    From the allocator's own events: temporaries inside operators count, as does what is kept.
    """
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        operation()
    assert profile.profiler is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert events, "the profiler saw no allocation"
    return peak


class BytesWritten(TorchDispatchMode):
    """Counts the bytes of every result that is not a view: what operators write."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        schema = func._schema
        if schema.name in ("aten::index_put_", "aten::_index_put_impl_"):
            self.total += args[2].nbytes  # the rows that change, not the whole of the target
        elif all(r.alias_info is None for r in schema.returns):
            outputs = result if isinstance(result, (tuple, list)) else (result,)
            self.total += sum(x.nbytes for x in outputs if isinstance(x, Tensor))
        elif schema.is_mutable and isinstance(result, Tensor):
            self.total += result.nbytes
        return result
