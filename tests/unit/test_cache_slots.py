"""One owner of the slots of a slab."""

from typing import Any

import pytest
import torch

from sixfold.cache.slots import Lease, Slots

CPU = torch.device("cpu")


def claimed(slots: Slots, batch: int, pages: int) -> Lease:
    lease = slots.claim(batch, pages, CPU)
    assert lease is not None
    return lease


def test_slots_are_free_again_with_their_last_lease() -> None:
    slots = Slots(4)
    first, second = claimed(slots, 1, 3), claimed(slots, 1, 1)
    assert first.slots.tolist() == [[0, 1, 2]]
    assert second.slots.tolist() == [[3]]
    again = slots.hold(first.slots[:, :2])
    del first
    assert claimed(slots, 1, 3).slots.tolist() == [[2]]
    del again
    assert claimed(slots, 1, 4).slots.tolist() == [[0, 1, 2]]


def test_sequences_get_equally_many() -> None:
    slots = Slots(7)
    assert claimed(slots, 3, 4).slots.shape == (3, 2)
    assert slots.claim(8, 1, CPU) is None


def test_a_claim_within_a_claim_gets_other_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    # As a signal handler makes it, or a thread: it must neither wait nor be given the same.
    slots, inner, find = Slots(8), [], Slots._find

    def interrupted(self: Slots, *args: Any) -> Any:
        free = find(self, *args)
        inner.append(self.claim(1, 2, CPU))
        return free

    monkeypatch.setattr(Slots, "_find", interrupted)
    assert claimed(slots, 1, 4).slots.tolist() == [[0, 1, 2, 3]]
    assert inner == [None]


def test_an_error_on_the_way_leaves_the_slab_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = Slots(4)
    with monkeypatch.context() as patch:
        patch.setattr(Slots, "_find", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            slots.claim(1, 4, CPU)
    assert claimed(slots, 1, 4).slots.tolist() == [[0, 1, 2, 3]]
