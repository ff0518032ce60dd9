"""The small trained model inside the package, for demos and tests without a network."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sixfold.errors import SixfoldError

NAME = "embedded"
"""What the command line calls this model."""


@contextmanager
def folder() -> Iterator[Path]:
    """The model's directory as a real path, for as long as the block runs.

    Raises:
        SixfoldError: The package was installed without its data files.
    """
    resource = files("sixfold.eval") / "embedded"
    if not (resource / "model.safetensors").is_file():
        raise SixfoldError(
            "the embedded model is missing from this install (expected "
            "sixfold/eval/embedded/model.safetensors); reinstall sixfold from a wheel or checkout"
        )
    with as_file(resource) as path:
        yield path


def load_embedded(
    dtype: torch.dtype = torch.float32,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the embedded Llama and its tokenizer, in evaluation mode.

    Raises:
        SixfoldError: The package was installed without its data files.
    """
    with folder() as path:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(path)
    return model.eval(), tokenizer


def haystack() -> str:
    """Prose written for the purpose, in which needles are hidden and perplexity is measured."""
    return (files("sixfold.eval") / "haystack.txt").read_text(encoding="utf-8")
