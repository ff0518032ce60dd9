"""How transformers' own tests are run with a compressed cache; the whole is a tool."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from sixfold import TurboQuantCache
from sixfold.integrations.transformers.keyword import cache_argument
from tests.tiny import tiny_model
from tools.blocks import RESULTS, ROOT
from tools.substituted_cache import (
    MODES,
    SETTINGS,
    Output,
    Recorder,
    compared,
    dense,
    difference,
    error,
)
from tools.transformers_tests import ARCHITECTURES, counts

CHECKOUT = os.environ.get("SIXFOLD_TRANSFORMERS_CHECKOUT")


def outputs(recorder: Recorder, tokens: int = 4, **options: object) -> Recorder:
    """Let `generate` run once with the caches of `recorder`, for a prompt of 100 tokens."""
    model = tiny_model()
    model.set_attn_implementation("sdpa")
    ids = torch.randint(3, 99, (2, 100), generator=torch.Generator().manual_seed(0))
    with recorder.installed():
        model.generate(
            ids,
            do_sample=False,
            max_new_tokens=tokens,
            pad_token_id=1,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
    return recorder


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_generate_makes_our_cache(setting: str, mode: str) -> None:
    ours = outputs(Recorder(SETTINGS[setting], mode))
    theirs = outputs(Recorder(SETTINGS[setting], None))
    [cache] = ours.caches
    assert isinstance(cache, TurboQuantCache)
    assert cache.fused is (mode == "fused")
    assert type(theirs.caches[0]) is DynamicCache
    # A window of 64 and as much as a page: 103 tokens are held in full precision.
    assert ours.coded is (setting != "windows")
    assert not theirs.coded
    assert compared(ours, theirs) == ("passed", "")
    assert (error(ours, theirs) > 1e-3) is (setting != "windows")


def test_a_cache_that_is_given_stays() -> None:
    given = DynamicCache(config=tiny_model().config)
    assert outputs(Recorder(SETTINGS["windows"], "fused"), **cache_argument(given)).caches == []
    assert given.get_seq_length() == 103


def test_what_differs_is_said_to() -> None:
    """Other tokens, other scores and too large errors."""
    theirs, ours = (Recorder(SETTINGS["windows"], None) for _ in range(2))
    tokens, scores = torch.arange(6).view(2, 3), (torch.ones(2, 5),)
    theirs.outputs = [Output(tokens, scores, torch.float32)]
    ours.outputs = [Output(tokens, scores, torch.float32)]
    assert compared(ours, theirs) == ("passed", "")
    ours.outputs = [Output(tokens, (scores[0] + 1e-3,), torch.float32)]
    assert "scores differ" in difference(ours, theirs)
    ours.outputs = [Output(tokens, (scores[0] + 1e-3,), torch.float16)]
    assert difference(ours, theirs) == ""
    ours.outputs = [Output(tokens + 1, scores, torch.float32)]
    assert "other tokens" in difference(ours, theirs)
    ours.outputs = []
    assert "0 calls" in difference(ours, theirs)
    lossy = Recorder(SETTINGS["8 bits"], "fused")
    for size, outcome in ((0.04, "passed"), (0.06, "failed"), (float("nan"), "failed")):
        lossy.outputs = [Output(tokens, (scores[0] * (1 + size),), torch.float32)]
        assert compared(lossy, theirs)[0] == outcome, size


def test_tests_see_dequantized_layers() -> None:
    [cache] = outputs(Recorder(SETTINGS["8 bits"], "fused")).caches
    [exact] = outputs(Recorder(SETTINGS["8 bits"], None)).caches
    seen = dense(cache)
    assert len(seen) == len(exact)
    assert dense(exact) is exact
    for ours, theirs in zip(seen.layers, exact.layers, strict=True):
        assert type(ours) is DynamicLayer
        assert ours.keys.shape == theirs.keys.shape
        assert 0 < (ours.keys - theirs.keys).norm() < 0.05 * theirs.keys.norm()
        assert 0 < (ours.values - theirs.values).norm() < 0.05 * theirs.values.norm()


def test_counts() -> None:
    row = {"architecture": "llama", "setting": "8 bits", "mode": "fused", "coded": True}
    passed = {**row, "outcome": "passed", "error": 0.5}
    [found] = counts([passed, {**passed, "error": 0.2}, {**row, "outcome": "failed"}])
    assert found["counts"] == {"passed": 2, "failed": 1, "on codes": 2}
    assert found["error"] == 0.5


def test_nothing_failed() -> None:
    """The committed run: every test that a `DynamicCache` passes, or a loss that is allowed."""
    rows = json.loads((RESULTS / "transformers_tests.json").read_text(encoding="utf-8"))["rows"]
    assert {row["architecture"] for row in rows} == set(ARCHITECTURES)
    assert len(rows) == len(ARCHITECTURES) * len(SETTINGS) * len(MODES)
    for row in rows:
        assert not row["counts"].get("failed"), row
        assert row["counts"].get("lossy", 0) <= 2 * (row["setting"] != "windows"), row
        assert row["counts"]["passed"] > 5, row
        assert (row["counts"]["on codes"] > 5) is (row["setting"] != "windows"), row
        assert row["error"] <= SETTINGS[row["setting"]].tolerance


@pytest.mark.slow
@pytest.mark.skipif(CHECKOUT is None, reason="SIXFOLD_TRANSFORMERS_CHECKOUT names no checkout")
def test_their_tests_pass(tmp_path: Path) -> None:
    """One architecture, in a process of its own: their tests are a package `tests`, as ours are."""
    command = [sys.executable, "-m", "tools.transformers_tests", str(CHECKOUT), "--only", "llama"]
    results = tmp_path / "results.json"
    done = subprocess.run(
        [*command, "--json", str(results)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    rows = json.loads(results.read_text(encoding="utf-8"))["rows"]
    assert all(row["counts"]["passed"] > 10 for row in rows)
