"""Runs vLLM in a process of its own: a job on standard input, what came of it in a file."""

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def main(out: Path) -> None:
    job = json.load(sys.stdin)
    if "kv_cache_memory_bytes" not in job["llm"]:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    else:
        # It would overrule what is asked for.
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    from vllm import LLM

    usual = {"enforce_eager": True, "dtype": "bfloat16", "disable_log_stats": False}
    llm = LLM(**{**usual, **job["llm"]})
    cache = llm.llm_engine.vllm_config.cache_config
    started = resident()
    found: dict[str, Any] = {
        "capacity": cache.kv_cache_size_tokens,
        "blocks": cache.num_gpu_blocks,
        "block_size": cache.block_size,
        "runs": [run(llm, **one) for one in job["runs"]],
        "resident": (started, resident()),
        "metrics": {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")},
    }
    torch.save(found, out)


def resident() -> int:
    """Bytes of memory that this process, the engine's unless there are several, really has."""
    ctypes.CDLL(None).malloc_trim(0)
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in x)
    return int(line.split()[1]) * 1024


def run(llm: Any, prompts: list[list[int]], one_by_one: bool = False, **sampling: Any) -> Any:
    """Answers to prompts of token ids; with `prompt_logprobs` -1, [tokens, vocabulary] of each."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, **sampling)
    requests = [{"prompt_token_ids": ids} for ids in prompts]
    batches = [[one] for one in requests] if one_by_one else [requests]
    outputs = [x for batch in batches for x in llm.generate(batch, parameters, use_tqdm=False)]
    return [
        {
            "ids": list(x.outputs[0].token_ids),
            "cached": x.num_cached_tokens,
            "logprobs": rows(x.outputs[0].logprobs),
            "prompt_logprobs": rows(x.prompt_logprobs and x.prompt_logprobs[1:]),
        }
        for x in outputs
    ]


def rows(given: Any) -> torch.Tensor | None:
    """Of every token, those of the whole vocabulary; none where not all were asked for."""
    if not given or len(given[0]) < 1000:
        return None
    table = torch.empty(len(given), len(given[0]))
    for row, one in zip(table, given, strict=True):
        row[torch.tensor(list(one))] = torch.tensor([x.logprob for x in one.values()])
    return table


if __name__ == "__main__":
    main(Path(sys.argv[1]))
