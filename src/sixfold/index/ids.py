"""Which slot each id has."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from sixfold.arguments import dense, shown
from sixfold.errors import SixfoldError

Ids: TypeAlias = np.ndarray
"""int64, or objects that are all strings."""

# What objects raise that are not what they seem. Not all there is: a signal handler may raise the
# rest.
UNREADABLE = (TypeError, ValueError, LookupError, AttributeError, RuntimeError, OverflowError)
# So few are kept in a dictionary: beyond, sorted numbers take an eighth of the memory.
_FEW = 4096


def checked_ids(ids: Any, name: str = "ids") -> Ids:
    """Whole numbers of 64 bits, or strings.

    Raises:
        SixfoldError: They are neither, or both.
    """
    if isinstance(ids, str | bytes):
        raise SixfoldError(f"{name} must be a sequence of ids, got {shown(ids)}; pass [{ids!r}]")
    try:
        return _checked(ids, name)
    except SixfoldError:
        raise
    except UNREADABLE as error:
        raise SixfoldError(
            f"{name} must be a sequence of ids, got {type(ids).__name__}: {error}"
        ) from error


def checked_filter(members: Any) -> Ids:
    """Ids, or where an array is true.

    Raises:
        SixfoldError: It holds neither.
    """
    try:
        return _from_mask(members)
    except SixfoldError:
        raise
    except UNREADABLE as error:
        raise SixfoldError(f"filter must be a mask in memory, got {shown(members)}") from error


def _from_mask(members: Any) -> Ids:
    mask = None
    if isinstance(members, Tensor) and members.dtype is torch.bool:
        dense("filter", members)
        mask = members.detach().cpu().numpy()
    elif isinstance(members, np.ndarray) and members.dtype == bool:
        mask = members
    if mask is not None:
        if mask.ndim != 1:
            raise SixfoldError(f"filter must be a mask on one axis, got {mask.ndim} axes")
        found: Ids = np.flatnonzero(mask)
        return found
    return checked_ids(members, "filter")


def _checked(ids: Any, name: str) -> Ids:
    if isinstance(ids, Tensor):
        dense(name, ids)
        ids = ids.detach().cpu().numpy()
    given = ids if isinstance(ids, np.ndarray) else list(ids)
    if isinstance(given, np.ndarray) and (given.ndim != 1 or given.dtype.kind not in "iuUO"):
        raise SixfoldError(
            f"{name} must be whole numbers or strings on one axis, got {given.dtype} "
            f"on {given.ndim}"
        )
    if isinstance(given, np.ndarray) and given.dtype.kind in "iu" and _fits(given):
        return given.astype(np.int64)
    members = given.tolist() if isinstance(given, np.ndarray) else given
    if all(isinstance(x, str) for x in members):
        # What cannot be written to a file would be noticed too late.
        if any(_has_surrogate(x) for x in members):
            raise SixfoldError(f"{name} must be valid Unicode, got a lone surrogate")
        return objects(map(str.__str__, members), len(members))
    numbers = [x for x in members if not isinstance(x, bool | np.bool_ | float | str)]
    if len(numbers) == len(members):
        try:
            return np.array([x.__index__() for x in numbers], dtype=np.int64)
        except (AttributeError, OverflowError, TypeError):
            pass
    raise SixfoldError(
        f"{name} must be all whole numbers of 64 bits or all strings, got {shown(members)}"
    )


def objects(values: Any, count: int) -> Ids:
    """Strings as an array of objects."""
    made = np.empty(count, dtype=object)
    for i, value in enumerate(values):
        made[i] = value
    return made


def repeated(ids: Ids) -> list[Any]:
    """Some ids that occur more than once."""
    if ids.dtype == object:
        # Not by NumPy, whose texts end with their last letter that is no NUL.
        counts = Counter(ids.tolist())
        return [x for x, count in counts.items() if count > 1][:3]
    values, counted = np.unique(ids, return_counts=True)
    found: list[Any] = values[counted > 1][:3].tolist()
    return found


def _fits(ids: np.ndarray) -> bool:
    return ids.dtype != np.uint64 or not len(ids) or int(ids.max()) < 2**63


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= c <= "\udfff" for c in text)


class IdTable:
    """Slots by id: numbers, sorted, and a dictionary of those that came since, or of strings."""

    def __init__(self) -> None:
        self._keys = np.empty(0, dtype=np.int64)
        self._slots = np.empty(0, dtype=np.int64)
        self._recent: dict[Any, int] = {}

    @property
    def nbytes(self) -> int:
        """About what it takes in memory: a dictionary a hundred bytes an id."""
        return self._keys.nbytes + self._slots.nbytes + 100 * len(self._recent)

    def find(self, ids: Ids) -> np.ndarray:
        """The slot of each id, -1 where there is none."""
        found = np.full(len(ids), -1, dtype=np.int64)
        if len(self._keys) and ids.dtype != object:
            place = np.searchsorted(self._keys, ids).clip(max=len(self._keys) - 1)
            found = np.where(self._keys[place] == ids, self._slots[place], -1)
        if self._recent:
            recent = self._recent
            later = (recent.get(x, -1) for x in ids.tolist())
            found = np.maximum(found, np.fromiter(later, np.int64, len(ids)))
        return found

    def put(self, ids: Ids, slots: np.ndarray) -> None:
        """Give these ids these slots, instead of those they had."""
        if ids.dtype != object and len(ids) > max(_FEW, len(self._keys) // 8):
            self._sort(ids, slots)
            return
        if len(self._keys):
            self.remove(ids)
        self._recent.update(zip(ids.tolist(), slots.tolist(), strict=True))
        if ids.dtype != object and len(self._recent) > max(_FEW, len(self._keys) // 8):
            none = np.empty(0, dtype=np.int64)
            self._sort(none, none)

    def remove(self, ids: Ids) -> None:
        """Forget these ids."""
        if len(self._keys) and ids.dtype != object:
            place = np.searchsorted(self._keys, ids).clip(max=len(self._keys) - 1)
            self._slots[place[self._keys[place] == ids]] = -1
        for x in ids.tolist():
            self._recent.pop(x, None)

    def _sort(self, ids: Ids, slots: np.ndarray) -> None:
        """All of them sorted; of an id that occurs twice the last counts."""
        count = len(self._recent)
        recent = np.fromiter(self._recent.keys(), np.int64, count)
        where = np.fromiter(self._recent.values(), np.int64, count)
        live = self._slots >= 0
        keys = np.concatenate([self._keys[live], recent, ids])
        values = np.concatenate([self._slots[live], where, slots])
        order = np.argsort(keys, kind="stable")
        keys, values = keys[order], values[order]
        last = np.ones(len(keys), dtype=bool)
        last[:-1] = keys[1:] != keys[:-1]
        self._keys, self._slots, self._recent = keys[last], values[last], {}


def missing(ids: Ids, slots: np.ndarray) -> Sequence[Any]:
    """Some of the ids that have no slot."""
    absent: list[Any] = ids[slots < 0][:3].tolist()
    return absent
