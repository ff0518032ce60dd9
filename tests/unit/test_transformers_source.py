"""Which layers attend on codes is read from what attention modules do with cached tensors."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sixfold.integrations.transformers.source import untouched_layers


class Attention(nn.Module):
    """Hands on what the cache returned."""

    def __init__(self, layer_idx: int, shares: bool = False) -> None:
        super().__init__()
        self.layer_idx, self.shares = layer_idx, shares

    def forward(self, query: Any, key: Any, value: Any, cache: Any, shared: Any) -> Any:
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        if self.shares and query is not None:
            shared["keys"] = key
        attend = ALL_ATTENTION_FUNCTIONS.get_interface("sixfold", None)
        return attend(self, query, key, value, None, scaling=1.0, sliding_window=None)


class Repeats(Attention):
    """Computes with cached keys before it attends."""

    def forward(self, query: Any, key: Any, value: Any, cache: Any, shared: Any) -> Any:
        key, value = cache.update(key, value, self.layer_idx)
        key = key.repeat_interleave(2, 1)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface("sixfold", None)
        return attend(self, query, key, value, None)


class Reads(Attention):
    """Reads no more than a shape, which codes do not have."""

    def forward(self, query: Any, key: Any, value: Any, cache: Any, shared: Any) -> Any:
        key, value = cache.update(key, value, self.layer_idx)
        shared["length"] = key.shape[2]
        attend = ALL_ATTENTION_FUNCTIONS.get_interface("sixfold", None)
        return attend(self, query, key, value, None)


class Selects(Attention):
    """Passes an argument that changes the mathematics."""

    def forward(self, query: Any, key: Any, value: Any, cache: Any, shared: Any) -> Any:
        key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface("sixfold", None)
        return attend(self, query, key, value, None, indices=shared)


class Swaps(Attention):
    """Attends to values by keys."""

    def forward(self, query: Any, key: Any, value: Any, cache: Any, shared: Any) -> Any:
        key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface("sixfold", None)
        return attend(self, query, value, key, None)


class Alone(Attention):
    """Never asks for an attention function."""

    def forward(self, query: Any, key: Any, value: Any, cache: Any, shared: Any) -> Any:
        key, value = cache.update(key, value, self.layer_idx)
        return torch.softmax(query @ key.mT, -1) @ value


class Anywhere(Attention):
    """One block for many layers, as in Zamba."""

    def forward(self, query: Any, key: Any, value: Any, cache: Any, layer_idx: Any) -> Any:
        key, value = cache.update(key, value, layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface("sixfold", None)
        return attend(self, query, key, value, None)


def test_untouched() -> None:
    assert untouched_layers(nn.ModuleList([Attention(0), Attention(2)]), 3) == {0, 2}


@pytest.mark.parametrize("kind", [Repeats, Reads, Selects, Swaps, Alone])
def test_touched(kind: type[Attention]) -> None:
    assert untouched_layers(nn.ModuleList([Attention(0), kind(1)]), 2) == {0}


def test_a_branch_that_a_module_never_takes_does_not_count() -> None:
    assert untouched_layers(nn.ModuleList([Attention(0), Attention(1, shares=True)]), 2) == {0}


def test_one_module_for_all_layers() -> None:
    assert untouched_layers(nn.ModuleList([Anywhere(0)]), 3) == {0, 1, 2}


def test_what_cannot_be_read_is_not_trusted() -> None:
    # Typed at a prompt, say: there is no source to look at.
    code = "class Typed(Base):\n    def forward(self, k, v, cache):\n        "
    code += "k, v = cache.update(k, v, self.layer_idx)\n        return k\n"
    names: dict[str, Any] = {"Base": Attention}
    exec(code, names)
    assert untouched_layers(nn.ModuleList([names["Typed"](0)]), 1) == set()


def test_a_module_that_updates_something_else() -> None:
    class Counter(nn.Module):
        def forward(self, counts: dict[str, int]) -> None:
            counts.update({"calls": 1})

    assert untouched_layers(nn.ModuleList([Attention(0), Counter()]), 1) == {0}
