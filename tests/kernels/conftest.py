"""Memory that nobody wrote shows."""

import math
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `torch.empty` return NaN, or 0x5A bytes, instead of what happens to be zero."""
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> torch.Tensor:
        tensor = empty(*size, **options)
        return tensor.fill_(math.nan if tensor.is_floating_point() else 0x5A)

    monkeypatch.setattr(torch, "empty", poisoned)
