"""The embedded model served from codes: what `make test-vllm` runs."""

import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch

from sixfold.cache.code import page_code
from sixfold.cache.engine import page_nbytes
from sixfold.integrations.vllm.names import WIDTHS, policy
from tests.vllm.conftest import Job, divergence, divergence_of_answers

EVERYTHING = {"max_logprobs": -1}
LAYERS, KV_HEADS, DIM = 4, 2, 64


@pytest.fixture(scope="module")
def prompts(text: list[int]) -> list[list[int]]:
    """Around the borders of pages, short and long."""
    lengths = [30, 63, 64, 65, 127, 128, 200, 500]
    return [text[i * 100 : i * 100 + n] for i, n in enumerate(lengths)]


@pytest.fixture(scope="module")
def base(job: Job, prompts: list[list[int]]) -> Any:
    run = {"prompts": prompts, "max_tokens": 4, "prompt_logprobs": -1}
    return job(run, enable_prefix_caching=False, max_num_batched_tokens=64, **EVERYTHING)


@pytest.fixture(scope="module")
def ours(job: Job, prompts: list[list[int]], text: list[int]) -> Any:
    scored = {"prompts": prompts, "max_tokens": 4, "prompt_logprobs": -1}
    long = text[:600]
    decoded = {"prompts": [long[:n] for n in (70, 300, 600)], "max_tokens": 80, "logprobs": -1}
    again = {"prompts": [long + text[700:740]], "max_tokens": 4}
    return job(
        scored,
        decoded,
        again,
        {**decoded, "one_by_one": True},
        # All new at once: vLLM shares blocks in the very step that fills them.
        {**decoded, "prompts": [text[2000 : 2000 + n] for n in (300, 330, 400)], "max_tokens": 8},
        {**decoded, "prompts": [text[2000:2330]], "max_tokens": 8},
        attention_backend="SIXFOLD_4BIT",
        max_num_batched_tokens=64,
        **EVERYTHING,
    )


def test_blocks_of_trellis_codes(
    job: Job, base: Any, ours: Any, prompts: list[list[int]], text: list[int]
) -> None:
    """As many of them, with other codes."""
    scored = {"prompts": prompts, "max_tokens": 4, "prompt_logprobs": -1}
    decoded = {"prompts": [text[:n] for n in (70, 300)], "max_tokens": 70, "logprobs": -1}
    found = job(
        scored,
        decoded,
        attention_backend="SIXFOLD_4BIT",
        additional_config={"sixfold": {"code": "trellis"}},
        max_num_batched_tokens=64,
        **EVERYTHING,
    )
    assert "Sixfold: 4 layers at 4 bits (trellis), 68 bytes a token" in found["log"]
    assert found["capacity"] == ours["capacity"]

    pairs = zip(base["runs"][0], found["runs"][0], ours["runs"][0], strict=True)
    for one, x, y in pairs:
        assert divergence(one["prompt_logprobs"], x["prompt_logprobs"]) < 2e-3
        if len(x["prompt_logprobs"]) > 130:
            assert not torch.equal(x["prompt_logprobs"], y["prompt_logprobs"])
    for one, other in zip(found["runs"][1], ours["runs"][1], strict=False):
        assert divergence_of_answers(one, other) < 5e-3


def test_capacity_is_the_ratio_of_bytes_to_one_block(base: Any, ours: Any) -> None:
    block = ours["block_size"]
    layer = page_nbytes(page_code(policy(4, DIM, DIM), DIM, DIM)) * KV_HEADS * (block // 64)
    assert ours["capacity"] == 2**30 // (LAYERS * layer) * block
    uncompressed = 2 * 2 * DIM * KV_HEADS * block
    assert base["capacity"] == 2**30 // (LAYERS * uncompressed) * block


def test_the_log_says_what_is_served(ours: Any) -> None:
    assert (
        "Sixfold: 4 layers at 4 bits (codebook), 68 bytes a token and KV head (bfloat16: 256)"
        in ours["log"]
    )


def test_what_is_not_coded_is_exact(base: Any, ours: Any) -> None:
    """In chunks of a page nothing is, of prompts up to one page."""
    for i in (0, 1, 2):
        assert torch.equal(
            base["runs"][0][i]["prompt_logprobs"], ours["runs"][0][i]["prompt_logprobs"]
        )


def test_the_model_is_the_same(base: Any, ours: Any) -> None:
    found = [
        divergence(x["prompt_logprobs"], y["prompt_logprobs"])
        for x, y in zip(base["runs"][0], ours["runs"][0], strict=True)
    ]
    assert max(found) < 0.004
    assert max(found[3:]) > 0, "nothing was read from codes"


def test_a_batch_gives_what_requests_alone_do(ours: Any) -> None:
    """Compared as far as the tokens before are the same: near-ties may fall either way."""
    together, alone = ours["runs"][1], ours["runs"][3]
    for x, y in zip(together, alone, strict=True):
        assert divergence_of_answers(x, y) < 0.004
        assert x["ids"][:5] == y["ids"][:5]


def test_prefixes_are_shared(ours: Any) -> None:
    (again,) = ours["runs"][2]
    assert again["cached"] == 600 // ours["block_size"] * ours["block_size"]
    assert all(x["cached"] == 0 for x in ours["runs"][0][:1])


def test_prefixes_are_shared_in_the_step_that_fills_them(ours: Any) -> None:
    together, alone = ours["runs"][4][1], ours["runs"][5][0]
    assert together["cached"] > 0
    assert together["ids"][0] == alone["ids"][0]
    assert divergence(together["logprobs"][:1], alone["logprobs"][:1]) < 0.004


def test_without_being_selected_it_changes_nothing(job: Job, prompts: list[list[int]]) -> None:
    run = {"prompts": prompts, "max_tokens": 16, "logprobs": -1}
    known, unknown = (
        job(run, env={"VLLM_PLUGINS": plugins}, **EVERYTHING) for plugins in ("sixfold", "")
    )
    assert known["capacity"] == unknown["capacity"]
    for x, y in zip(known["runs"][0], unknown["runs"][0], strict=True):
        assert x["ids"] == y["ids"]
        assert torch.equal(x["logprobs"], y["logprobs"])


def test_registering_takes_no_time() -> None:
    """Beside what vLLM has imported whenever it loads plugins, and sixfold itself."""
    script = (
        "import time, vllm.engine.arg_utils, sixfold\n"
        "from vllm.platforms import current_platform; current_platform.is_cpu()\n"
        "start = time.perf_counter(); from sixfold.integrations.vllm import register; register()\n"
        "register(); print(time.perf_counter() - start)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert float(done.stdout.split()[-1]) < 0.05, done.stderr


def test_a_spawned_process_can_read_a_configuration() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from sixfold.integrations.vllm import register

    register()
    for name in WIDTHS:
        data = pickle.dumps(AttentionBackendEnum[name])
        script = f"import pickle; print(pickle.loads({data!r}).get_class().__name__)"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.stdout.split()[-1].startswith("Sixfold"), done.stderr
