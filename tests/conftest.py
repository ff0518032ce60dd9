"""What all tests share: no network, GPU tests only where there is one, a tiny model on disk."""

import os
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch

# Before transformers is imported: a test that looks for a hub must fail at once.
os.environ["HF_HUB_OFFLINE"] = "1"


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


@pytest.fixture
def exact_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention on codes in float32, for tests that compare with float64 (the default is 8-bit)."""
    monkeypatch.setenv("SIXFOLD_CPU_EXACT", "1")
