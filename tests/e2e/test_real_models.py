"""What real models do at the defaults is what README says: weights that no one here has trained.

Slow, and skipped without the weights: `SIXFOLD_REAL_MODELS` names a directory with the checkpoints
below, in transformers' format.
"""

import functools
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sixfold.eval.caches import compressed, dequantizing
from sixfold.eval.embedded import haystack
from sixfold.eval.perplexity import compare_caches, windows_of

WINDOW, PREFILL = 768, 512
# Mean KL to the uncompressed model in nats, at most, by bits: a quarter above what codebooks gave.
LIMITS = {
    "smollm2-135m": (torch.float32, {4: 0.0019, 3: 0.006, 2.5: 0.018, 2: 0.04}),
    "gemma3-270m": (torch.float32, {4: 0.002, 3: 0.0048, 2.5: 0.0125, 2: 0.03}),
    "qwen25-coder-1.5b": (torch.bfloat16, {4: 0.0013, 3: 0.0035, 2.5: 0.008, 2: 0.0155}),
}

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("unhooked")]


@functools.lru_cache(maxsize=1)
def loaded(name: str) -> tuple[PreTrainedModel, torch.Tensor]:
    """A model and a window of text."""
    folder = Path(os.environ.get("SIXFOLD_REAL_MODELS", "")) / name
    if "SIXFOLD_REAL_MODELS" not in os.environ or not folder.is_dir():
        pytest.skip(f"SIXFOLD_REAL_MODELS names no directory with {name}")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=LIMITS[name][0]).eval()
    return model, windows_of(AutoTokenizer.from_pretrained(folder), haystack(), WINDOW, 1)


@pytest.mark.parametrize("mode", ["fused", "dequantized", "reference"])
@pytest.mark.parametrize("name", LIMITS)
def test_compression_does_not_show(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows = loaded(name)
    if mode == "reference":
        monkeypatch.setenv("SIXFOLD_BACKEND", "reference")
    make = dequantizing if mode == "dequantized" else compressed
    limits = LIMITS[name][1]
    caches = {f"{bits:g}": make(bits) for bits in limits}
    found = compare_caches(model, windows, caches, prefill=PREFILL)
    measured = {bits: found[f"{bits:g}"].kl.mean for bits in limits}
    assert all(measured[bits] <= limit for bits, limit in limits.items()), measured
