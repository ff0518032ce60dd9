"""Models that vLLM reads from a folder: ``embedded`` and ``hard`` by name, others by their path."""

from pathlib import Path

import torch

from benchmarks.evaluate import hard_model
from sixfold.eval.embedded import load_embedded

LOADERS = {"embedded": load_embedded, "hard": hard_model}


def folder_of(model: str, parent: Path) -> Path:
    """Where the model is; one of ours is written there first, in bfloat16."""
    if model not in LOADERS:
        return Path(model)
    made, tokenizer = LOADERS[model](torch.bfloat16)
    path = parent / model
    made.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
