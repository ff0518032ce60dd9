"""Who uses which slot of a slab: the one place that hands slots out."""

import threading
import weakref
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor


class Lease:
    """A table of slots in use: for as long as it lives, nobody else is given any of them."""

    __slots__ = ("__weakref__", "slots")

    def __init__(self, owner: "Slots", slots: Int64[Tensor, "batch pages"]) -> None:
        self.slots = slots
        # No `__del__`: a signal may interrupt one, and slots would stay in use for ever.
        owner.leases.add(weakref.ref(self, owner.leases.discard))


class Slots:
    """The slots of a slab: which are free, and the only way to get one. Safe in threads.

    Forks share a slab and may grow at the same time, in other threads or in a signal handler that
    interrupts one of them. Only `claim` finds free slots, and it leases them before another claim
    begins. It never waits, as an interrupted claim would wait for itself for ever: whoever finds
    the slab busy gets no slot of it, and takes a slab of its own.

    Attributes:
        leases: Those that live. Single steps of a set need no lock.
    """

    def __init__(self, capacity: int, used: int = 0) -> None:
        """`capacity` slots, the first `used` of which somebody holds already."""
        self.capacity = capacity
        self.leases: set[weakref.ref[Lease]] = set()
        self._used = used
        self._claiming = threading.Lock()

    def claim(self, batch: int, pages: int, device: torch.device) -> Lease | None:
        """Lease a table of `pages` free slots a sequence, or of the most there are; None of none.

        Args:
            batch: Sequences.
            pages: Slots wanted for each.
            device: Of the table.
        """
        if not self._claiming.acquire(blocking=False):
            return None
        try:
            free = self._find(batch * pages, device)
            found = len(free) // batch
            if found == 0:
                return None
            return Lease(self, free[: found * batch].view(found, batch).T.contiguous())
        finally:
            self._claiming.release()

    def hold(self, slots: Int64[Tensor, "batch pages"]) -> Lease:
        """Lease slots once more that a living lease, or nobody else, has."""
        return Lease(self, slots)

    def shared(self, lease: Lease) -> bool:
        """Whether there are other leases."""
        return any(x is not lease for x in self._living())

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, whose memory others may write to, hands nothing out."""
        return Slots, (self.capacity, self.capacity)

    def _find(self, count: int, device: torch.device) -> Int64[Tensor, " free"]:
        """Free slots: `count`, or all there are. Slots never used come first: no table is read."""
        if self.capacity - self._used >= count:
            self._used += count
            return torch.arange(self._used - count, self._used, device=device)
        self._used = self.capacity
        free = torch.ones(self.capacity, dtype=torch.bool, device=device)
        for lease in self._living():
            free[lease.slots.flatten()] = False
        return free.nonzero().flatten()[:count]

    def _living(self) -> list[Lease]:
        return [lease for x in list(self.leases) if (lease := x()) is not None]
