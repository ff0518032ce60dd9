"""What all tests share: no network, GPU tests only where there is one, a tiny model on disk."""

import inspect
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch

# Before transformers is imported: a test that looks for a hub must fail at once.
os.environ["HF_HUB_OFFLINE"] = "1"
# Before a kernel is defined: without a GPU Triton's kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

try:
    import triton
except ImportError:
    pass
else:
    _jit = triton.jit

    def _jit_unchecked(function: Any = None, **options: Any) -> Any:
        """Triton reads a kernel's source and globals: not those of what checks its shapes."""
        if function is None:
            return partial(_jit_unchecked, **options)
        return _jit(inspect.unwrap(function), **options)

    triton.jit = _jit_unchecked


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama and its tokenizer, as `from_pretrained` reads them."""
    from tests.tiny import tiny_model, tiny_tokenizer

    folder = tmp_path_factory.mktemp("tiny")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def unhooked() -> Iterator[None]:
    """Switch shape checks off, as they are for users, so that our own messages are tested."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def codes_from_the_first_page(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Caches do not wait for tokens to fit key maps to: tests of codes have few.

    Those of how caches wait are marked `waiting`.
    """
    if "transformers" in sys.modules and not request.node.get_closest_marker("waiting"):
        from sixfold import TurboQuantCache

        defaults = inspect.unwrap(TurboQuantCache.__init__).__kwdefaults__
        monkeypatch.setitem(defaults, "fit_tokens", 0)


@pytest.fixture
def exact_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention on codes in float32, for tests that compare with float64 (the default is 8-bit)."""
    monkeypatch.setenv("SIXFOLD_CPU_EXACT", "1")
