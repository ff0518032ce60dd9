"""``--kv-cache-dtype sixfold_4bit``, which needs no other switch from vLLM 0.33 on."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch

from sixfold.integrations.vllm.names import WIDTHS, cache_dtype
from tests.vllm.conftest import EMBEDDED, Job

SERVER = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
SERVER += ["--model", str(EMBEDDED), "--served-model-name", "model", "--max-model-len", "2048"]
QUIET = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


def taken() -> bool:
    from vllm.config import cache

    return hasattr(cache, "register_kv_cache_dtype")


@pytest.fixture
def newer() -> None:
    if not taken():
        pytest.skip("vLLM before 0.33 takes no --kv-cache-dtype from a plugin")


@pytest.fixture
def older() -> None:
    if taken():
        pytest.skip("since 0.33 vLLM takes a --kv-cache-dtype from a plugin")


def test_a_dtype_is_the_same_as_the_backend_that_it_names(
    newer: None, job: Job, text: list[int]
) -> None:
    run = {"prompts": [text[:n] for n in (60, 300)], "max_tokens": 20, "logprobs": -1}
    dtype = job(run, max_logprobs=-1, kv_cache_dtype="sixfold_3_5bit")
    backend = job(run, max_logprobs=-1, attention_backend="SIXFOLD_3_5BIT")
    assert "Sixfold: 4 layers at 3.5 bits (codebook)" in dtype["log"]
    assert "was tested with vLLM" not in dtype["log"]
    assert (dtype["blocks"], dtype["block_size"]) == (backend["blocks"], backend["block_size"])
    for x, y in zip(dtype["runs"][0], backend["runs"][0], strict=True):
        assert torch.equal(x["logprobs"], y["logprobs"])


def test_every_width_is_registered_once(newer: None) -> None:
    """vLLM calls plugins several times, and warns of dtypes that are registered twice."""
    script = (
        "from vllm.config import cache\n"
        "from sixfold.integrations.vllm import register; register(); register()\n"
        "print(*(x for x in cache.KV_CACHE_DTYPES if x.startswith('sixfold')))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1].split() == [cache_dtype(name) for name in WIDTHS]
    assert "already exists" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_backend": "SIXFOLD_2BIT"}, "name different widths"),
        ({"kv_cache_dtype_skip_layers": ["0"]}, "does not support leaving layers uncompressed"),
        ({"block_size": 32}, "block_size not supported"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
@pytest.mark.slow
def test_what_contradicts_a_dtype_is_refused(
    newer: None, options: dict[str, Any], message: str, refusal: Any
) -> None:
    assert message in refusal(kv_cache_dtype="sixfold_4bit", **options)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_a_server_answers_with_no_other_switch(newer: None, mode: str, tmp_path: Path) -> None:
    """Its engine is a process of its own, to which the name of the dtype is sent."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*SERVER, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--kv-cache-dtype", "sixfold_4bit"]
    command += ["--enforce-eager"] if mode == "eager" else []
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env={**os.environ, **QUIET}, stdout=log, stderr=log)
        try:
            answer = _asked(f"http://127.0.0.1:{port}", process)
        finally:
            process.terminate()
            process.wait(60)
    said = (tmp_path / "log").read_text()
    assert answer is not None, said[-3000:]
    assert answer["usage"]["completion_tokens"] == 90
    assert "Sixfold: 4 layers at 4 bits (codebook)" in said


def _asked(address: str, process: "subprocess.Popen[bytes]") -> Any:
    body = {"model": "model", "prompt": "Once upon a time", "max_tokens": 90, "ignore_eos": True}
    request = urllib.request.Request(
        f"{address}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return json.load(response)
        except urllib.error.HTTPError:
            raise
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    return None


def test_where_it_is_not_taken_python_says_what_to_do(older: None, refusal: Any) -> None:
    said = refusal(kv_cache_dtype="sixfold_3_5bit")
    assert "type --attention-backend SIXFOLD_3_5BIT in place of" in said


def test_where_it_is_not_taken_the_server_says_what_to_do(older: None) -> None:
    command = [*SERVER, "--kv-cache-dtype", "sixfold_4bit"]
    done = subprocess.run(
        command, env={**os.environ, **QUIET}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "type --attention-backend SIXFOLD_4BIT in place of" in done.stderr
