"""Models are handed caches under the name the installed transformers knows, without warnings."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, GenerationMixin, LlamaForCausalLM

from sixfold.integrations.transformers import cache_argument
from sixfold.integrations.transformers.keyword import CACHE_KEYWORD
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[2]
# Put together, so that this file is none of those it looks for.
OLD = "past_key" + "_values"


@pytest.mark.parametrize(
    "function",
    [LlamaForCausalLM.forward, GenerationMixin.prepare_inputs_for_generation],
    ids=["forward", "generate"],
)
def test_models_know_the_name(function: object) -> None:
    assert callable(function)
    assert CACHE_KEYWORD in inspect.signature(function).parameters


def test_neither_forward_nor_generate_warn() -> None:
    """A warning is an error in tests."""
    model, ids = tiny_model(), torch.arange(2, 12)[None]
    cache = DynamicCache(config=model.config)
    out = model(ids, **cache_argument(cache))
    assert getattr(out, CACHE_KEYWORD) is cache
    longer = torch.cat((ids, torch.tensor([[12]])), 1)
    model.generate(longer, **cache_argument(cache), max_new_tokens=2, do_sample=False)
    assert cache.get_seq_length() == longer.shape[1] + 1


def test_one_place_knows_both_names() -> None:
    """Elsewhere the older one warns from 5.24 on, and is gone in 5.40."""
    folders = ("src", "benchmarks", "tools", "training", "tests", "examples")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    word = re.compile(rf"\b{OLD}\b")
    naming = {x.relative_to(ROOT) for x in files if word.search(x.read_text(encoding="utf-8"))}
    assert naming == {Path("src/sixfold/integrations/transformers/keyword.py")}
