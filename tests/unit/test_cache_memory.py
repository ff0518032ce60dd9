"""Memory of slabs: any size, huge pages where they fit, and none kept."""

import gc
import mmap
from pathlib import Path

import pytest
import torch

from sixfold.cache.memory import HUGE, empty
from sixfold.cache.pages import Slab

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [(0,), (3, 5), (HUGE - 1,), (HUGE,), (5, HUGE // 2 + 3)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16])
def test_memory_is_what_torch_would_give(size: tuple[int, ...], dtype: torch.dtype) -> None:
    x = empty(*size, dtype=dtype, device=CPU)
    like = torch.empty(size, dtype=dtype)
    assert (x.shape, x.dtype, x.stride()) == (like.shape, like.dtype, like.stride())
    assert x.untyped_storage().nbytes() == like.untyped_storage().nbytes()
    x.fill_(7)
    assert bool((x == 7).all())


def mapping(address: int) -> dict[str, str] | None:
    """What the system says about the mapping that `address` is in."""
    found: dict[str, str] | None = None
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines():
        head, _, rest = line.partition(" ")
        if "-" in head:
            if found is not None:
                return found
            first, last = (int(part, 16) for part in head.split("-"))
            found = {} if first <= address < last else None
        elif found is not None:
            found[head.rstrip(":")] = rest
    return found


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no huge pages on this system")
def test_large_slabs_ask_for_huge_pages_and_give_them_back() -> None:
    slab = Slab.allocate(512, 8, 4096, 4096, CPU)
    address = slab.pool.key_codes.data_ptr()
    assert address % HUGE == 0
    found = mapping(address)
    assert found is not None
    assert " hg" in found["VmFlags"]
    del slab
    gc.collect()
    assert mapping(address) is None


def test_a_system_without_huge_pages_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert empty(2 * HUGE, dtype=torch.uint8, device=CPU).fill_(1).sum() == 2 * HUGE
