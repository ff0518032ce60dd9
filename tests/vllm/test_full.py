"""What takes minutes: other models, every width, pressure, refusals, several processes."""

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sixfold.cache.code import page_code
from sixfold.cache.engine import page_nbytes
from sixfold.cache.key_maps import KeyMaps
from sixfold.integrations.vllm.names import WIDTHS, policy
from tests.vllm.conftest import EMBEDDED, ROOT, Job, divergence, divergence_of_answers

pytestmark = pytest.mark.slow

EVERYTHING = {"max_logprobs": -1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from tests.vllm.models import save

    return lambda name: str(save(name, tmp_path_factory.mktemp("models"), EMBEDDED))


# The logits of a random Gemma 4 are eight times as large as a trained one's: its keys have a norm
# of their own and no scaling. The cache for transformers moves its answers by 0.007 at 8 bits.
ARCHITECTURES = {
    **dict.fromkeys(("gemma2", "gemma3", "qwen2", "mistral", "llama128", "llama256"), 2e-3),
    "gemma4": 2e-2,
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures_at_eight_bits(
    name: str, job: Job, model: Any, text: list[int]
) -> None:
    """Prompts in chunks, then decoding across pages: the same model, as far as 8 bits tell."""
    path, most = model(name), ARCHITECTURES[name]
    scored = {"prompts": [text[:n] for n in (90, 400)], "max_tokens": 1, "prompt_logprobs": -1}
    decoded = {"prompts": [text[:n] for n in (60, 130, 300)], "max_tokens": 90, "logprobs": -1}
    options = {"model": path, "max_num_batched_tokens": 256, **EVERYTHING}
    base = job(scored, decoded, **options)
    ours = job(scored, decoded, attention_backend="SIXFOLD_8BIT", **options)
    assert ours["capacity"] > 1.9 * base["capacity"]
    for x, y in zip(base["runs"][0], ours["runs"][0], strict=True):
        assert divergence(x["prompt_logprobs"], y["prompt_logprobs"]) < most
        assert divergence(x["prompt_logprobs"], y["prompt_logprobs"].roll(1, 0)) > 10 * most
    for x, y in zip(base["runs"][1], ours["runs"][1], strict=True):
        assert divergence_of_answers(x, y) < most


@pytest.mark.parametrize("name", WIDTHS)
@pytest.mark.parametrize(
    ("which", "layers", "heads", "dim"), [("llama128", 4, 2, 128), ("llama256", 4, 1, 256)]
)
def test_capacity_of_every_width(
    name: str, which: str, layers: int, heads: int, dim: int, job: Job, model: Any
) -> None:
    found = job(model=model(which), attention_backend=name)
    code = page_code(policy(WIDTHS[name], dim, dim), dim, dim)
    block = found["block_size"]
    size = layers * heads * page_nbytes(code) * (block // 64)
    assert found["capacity"] == 2**30 // size * block


def test_random_load_under_pressure(job: Job, text: list[int]) -> None:
    """24 blocks: preemption, shared prefixes, long and short; then the same requests alone."""
    order = random.Random(0)
    prompts = []
    for _ in range(120):
        start = order.choice([0, 0, 700, order.randint(0, 3000)])
        prompts.append(text[start : start + order.choice([5, 64, 130, 300, 600])])
    run = {"prompts": prompts, "max_tokens": 60, "logprobs": -1}
    options = {
        "attention_backend": "SIXFOLD_8BIT",
        "block_size": 64,
        "num_gpu_blocks_override": 24,
        "max_num_seqs": 8,
        "max_model_len": 1024,
        **EVERYTHING,
    }
    found = job(run, **options)
    alone = job({**run, "prompts": prompts[:12], "one_by_one": True}, **options)
    assert found["metrics"]["vllm:num_preemptions"] > 0
    assert sum(x["cached"] > 0 for x in found["runs"][0]) > 5
    for x, y in zip(found["runs"][0], alone["runs"][0], strict=False):
        assert divergence_of_answers(x, y) < 2e-3


def test_a_short_soak() -> None:
    """Aborts as well, and all answers: `make soak-vllm` is the long one."""
    command = [sys.executable, "-m", "tests.vllm.soak", "--seconds", "20", "--seed", "2"]
    command += ["--backend", "SIXFOLD_4BIT"]
    env = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "TRITON_INTERPRET")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=900)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]


def test_two_processes_give_what_one_does(job: Job, text: list[int], tmp_path: Path) -> None:
    """Tensor parallel over gloo: each has its heads, and its part of a map from a file."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("vLLM gives each process a core of its own, and this one may use only one")
    generator = torch.Generator().manual_seed(0)
    maps = KeyMaps(
        {
            layer: (
                torch.randn(2, 64, generator=generator),
                torch.rand(2, 64, generator=generator) + 0.5,
            )
            for layer in range(4)
        }
    )
    maps.save(tmp_path / "maps.safetensors")
    run = {"prompts": [text[:300], text[500:900]], "max_tokens": 40, "logprobs": -1}
    options = {
        "attention_backend": "SIXFOLD_8BIT",
        "additional_config": {"sixfold": {"key_map": str(tmp_path / "maps.safetensors")}},
        **EVERYTHING,
    }
    one = job(run, **options)
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_SIM_MULTI_NUMA": "1"}
    two = job(run, env=env, tensor_parallel_size=2, **options)
    for x, y in zip(one["runs"][0], two["runs"][0], strict=True):
        assert divergence_of_answers(x, y) < 2e-3


def test_compiled_and_in_a_process_of_its_own(job: Job, text: list[int]) -> None:
    run = {"prompts": [text[:300]], "max_tokens": 20, "logprobs": -1}
    options = {"attention_backend": "SIXFOLD_4BIT", **EVERYTHING}
    eager = job(run, **options)
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    compiled = job(run, env=env, enforce_eager=False, **options)
    x, y = eager["runs"][0][0], compiled["runs"][0][0]
    assert divergence_of_answers(x, y) < 2e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_backend": "SIXFOLD_1BIT"}, "SIXFOLD_2BIT"),
        (
            {"attention_backend": "SIXFOLD_4BIT", "kv_cache_dtype": "fp8"},
            "kv_cache_dtype not supported",
        ),
        ({"attention_backend": "SIXFOLD_4BIT", "block_size": 32}, "block_size not supported"),
        (
            {
                "attention_backend": "SIXFOLD_4BIT",
                "speculative_config": {"method": "ngram", "num_speculative_tokens": 2},
            },
            "does not support speculative decoding",
        ),
        (
            {
                "attention_backend": "SIXFOLD_4BIT",
                "kv_transfer_config": {
                    "kv_connector": "ExampleConnector",
                    "kv_role": "kv_both",
                    "kv_connector_extra_config": {"shared_storage_path": "unused"},
                },
            },
            "KV connector not supported",
        ),
        (
            {
                "attention_backend": "SIXFOLD_4BIT",
                "additional_config": {"sixfold": {"keymap": "x"}},
            },
            "did you mean key_map",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_cannot_be_served_is_refused(
    options: dict[str, Any], message: str, refusal: Any
) -> None:
    assert message in refusal(**options)


def test_maps_of_another_model_are_refused(refusal: Any, tmp_path: Path) -> None:
    maps = KeyMaps({layer: (torch.zeros(2, 64), torch.ones(2, 64)) for layer in range(28)})
    maps.save(tmp_path / "maps.safetensors")
    options = {"sixfold": {"key_map": str(tmp_path / "maps.safetensors")}}
    said = refusal(attention_backend="SIXFOLD_4BIT", additional_config=options)
    assert "expected maps of 4 layers" in said


def test_many_requests_share_a_prefix(job: Job, text: list[int]) -> None:
    """Their pages are decoded once for all; some have short and some have long ends."""
    long = text[:640]
    prompts = [long + text[1000 + i : 1000 + i + 3 + 5 * i] for i in range(30)]
    first = {"prompts": [long], "max_tokens": 1}
    scored = {"prompts": prompts, "max_tokens": 1, "logprobs": -1}
    options = {"max_num_batched_tokens": 1024, **EVERYTHING}
    base = job(first, scored, **options)
    ours = job(first, scored, attention_backend="SIXFOLD_8BIT", **options)
    assert all(x["cached"] == 640 for x in ours["runs"][1])
    for x, y in zip(base["runs"][1], ours["runs"][1], strict=True):
        assert divergence(x["logprobs"], y["logprobs"]) < 2e-3
