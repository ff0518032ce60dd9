"""What the examples load: a model of a hub, or the small one inside the package."""

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from sixfold.eval.embedded import NAME, haystack, load_embedded


def load(name: str) -> tuple[Any, Any]:
    """A causal language model, and its tokenizer."""
    if name == NAME:
        return load_embedded()
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    return model.eval(), AutoTokenizer.from_pretrained(name)


def read(path: Path | None) -> str:
    """The text of a file, or the beginning of that inside the package."""
    return haystack()[:6000] if path is None else path.read_text(encoding="utf-8")
