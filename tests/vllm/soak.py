"""Random load on a cache that is too small for it, then every answer again, alone.

    python -m tests.vllm.soak --seconds 600 --seed 0

Requests long and short, with and without a common prefix, arrive, are preempted, and are aborted
while their prompt is read or while they answer. The rows of raw pages are counted after every step.
Answers are scored by the same engine, each as a prompt of its own in an empty cache.
"""

import argparse
import json
import math
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from random import Random
from typing import Any

from tests.vllm.conftest import EMBEDDED, ROOT

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

BLOCKS, BLOCK = 24, 64
RUNNING, WAITING = 8, 4
# Candidates of a token as it was generated, and those among which they are found when it is alone.
SHOWN, FOUND = 10, 100
# Mean KL over a request's tokens. Two that are within x of a third are within 4x of each other, as
# square roots of KL add up like distances; x is what test_smoke.py and test_full.py allow.
LIMITS = {"SIXFOLD_8BIT": 2e-3, "SIXFOLD_4BIT": 4 * 0.004}


@dataclass
class Asked:
    """A request, and what came of it."""

    prompt: list[int]
    answer: list[int] = field(default_factory=list)
    shown: list[dict[int, float]] = field(default_factory=list)
    cached: int = 0


class Soak:
    """An engine under load."""

    def __init__(self, backend: str, seed: int) -> None:
        from tokenizers import Tokenizer
        from vllm import LLM

        story = (ROOT / "src" / "sixfold" / "eval" / "haystack.txt").read_text()
        tokenizer = Tokenizer.from_file(str(EMBEDDED / "tokenizer.json"))
        self.text: list[int] = tokenizer.encode(story).ids
        self.llm = LLM(
            model=str(EMBEDDED),
            attention_backend=backend,
            dtype="bfloat16",
            enforce_eager=True,
            block_size=BLOCK,
            num_gpu_blocks_override=BLOCKS,
            max_num_seqs=RUNNING,
            max_num_batched_tokens=256,
            max_model_len=1024,
            max_logprobs=FOUND,
            disable_log_stats=False,
        )
        self.engine: Any = self.llm.llm_engine
        self.core: Any = self.engine.engine_core.engine_core
        self.order = Random(seed)
        self.running: dict[str, Asked] = {}
        self.ended: list[Asked] = []
        self.counts: Counter[str] = Counter()
        self.most_rows = 0
        # Every map that each layer has had.
        self.maps: dict[str, list[Any]] = {}

    def load(self, seconds: float) -> None:
        """Requests for so long, and until the last has ended."""
        end = time.monotonic() + seconds
        while time.monotonic() < end or self.running:
            if time.monotonic() < end:
                self._arrive()
                self._abort()
            for output in self.engine.step():
                self._take(output)
            self.counts["steps"] += 1
            self.check_rows()
            self.note_maps()

    def _arrive(self) -> None:
        from vllm import SamplingParams

        # In waves: at times the engine is nearly idle.
        wave = 1 + (RUNNING + WAITING - 1) * (1 + math.sin(self.counts["steps"] / 200)) / 2
        if len(self.running) >= wave:
            return
        start = self.order.choice([0, 0, 700, self.order.randint(0, 3000)])
        length = self.order.choice([5, 63, 64, 130, 300, 600, 800])
        asked = Asked(self.text[start : start + length])
        count = self.order.choice([1, 8, 40, 90, 150])
        self.counts["requests"] += 1
        name = str(self.counts["requests"])
        parameters = SamplingParams(temperature=0, max_tokens=count, logprobs=SHOWN)
        self.engine.add_request(name, {"prompt_token_ids": asked.prompt}, parameters)
        self.running[name] = asked

    def _abort(self) -> None:
        if not self.running or self.order.random() > 0.01:
            return
        name = self.order.choice(list(self.running))
        self.engine.abort_request([name])
        asked = self.running.pop(name)
        self.counts["aborted in decode" if asked.answer else "aborted in prefill"] += 1
        self.ended.append(asked)

    def _take(self, output: Any) -> None:
        asked = self.running.get(output.request_id)
        if asked is None:
            return
        (answer,) = output.outputs
        asked.answer = list(answer.token_ids)
        asked.shown = [{i: x.logprob for i, x in one.items()} for one in answer.logprobs]
        asked.cached = output.num_cached_tokens or 0
        if output.finished:
            self.ended.append(self.running.pop(output.request_id))

    def check_rows(self) -> None:
        """Every row of raw pages that was ever used is free or some block's, and no two's."""
        runner = self.core.model_executor.driver_worker.worker.model_runner
        for group in (one for groups in runner.attn_groups for one in groups):
            pages = group.get_metadata_builder().raw_pages
            rows = [*pages._free, *pages._open.values(), *pages._full.values()]
            assert sorted(rows) == list(range(pages.used)), "a row was lost, or has two owners"
            assert len(pages) <= pages.used <= pages.rows
            self.most_rows = max(self.most_rows, pages.used)

    def note_maps(self) -> None:
        """Key maps change until they are fitted to enough tokens."""
        worker = self.core.model_executor.driver_worker.worker
        context = worker.vllm_config.compilation_config.static_forward_context
        for name, attention in context.items():
            found, seen = attention.impl.layer.key_map, self.maps.setdefault(name, [])
            if found is not None and (not seen or seen[-1] is not found):
                seen.append(found)

    def free_blocks(self) -> int:
        """Of vLLM's pool."""
        return int(self.core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    def preemptions(self) -> int:
        """That vLLM counted."""
        found = {m.name: m.value for m in self.llm.get_metrics() if hasattr(m, "value")}
        return int(found["vllm:num_preemptions"])

    def divergence(self, asked: Asked) -> float:
        """Mean KL over the tokens of an answer, to the same tokens read as a prompt alone.

        Of candidates shown and of all others together: never above the KL of all.
        """
        from vllm import SamplingParams

        self.llm.reset_prefix_cache()
        ids = [*asked.prompt, *asked.answer]
        parameters = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=FOUND)
        (output,) = self.llm.generate([{"prompt_token_ids": ids}], parameters, use_tqdm=False)
        rows = output.prompt_logprobs[len(asked.prompt) :]
        return sum(map(_divergence, rows, asked.shown)) / len(rows)


def _divergence(alone: dict[int, Any], shown: dict[int, float]) -> float:
    missing = shown.keys() - alone.keys()
    assert not missing, f"{missing} of {shown} are not among the {FOUND} likeliest alone"
    pairs = [(x, alone[i].logprob) for i, x in shown.items()]
    p, q = (max(1e-9, 1 - sum(math.exp(x) for x in side)) for side in zip(*pairs, strict=True))
    return sum(math.exp(x) * (x - y) for x, y in pairs) + p * math.log(p / q)


def soak(seconds: float, seed: int, backend: str) -> dict[str, Any]:
    """Run it, and say what happened.

    Raises:
        AssertionError: A row or a block was lost, or an answer is not that of the request alone.
    """
    load = Soak(backend, seed)
    began, empty = time.monotonic(), load.free_blocks()
    load.load(seconds)
    took = time.monotonic() - began
    assert load.free_blocks() == empty, "blocks of requests that ended were not given back"
    answered = [x for x in load.ended if x.answer]
    preemptions = load.preemptions()
    found = [load.divergence(x) for x in answered]
    load.check_rows()
    assert max(found) < LIMITS[backend], max(found)
    maps = [len(seen) for seen in load.maps.values()]
    assert min(maps) > 1, "a layer kept the map of its first page"
    return {
        "backend": backend,
        "seed": seed,
        "seconds": round(took),
        **load.counts,
        "answers compared": len(answered),
        "tokens compared": sum(len(x.answer) for x in answered),
        "with a prefix hit": sum(x.cached > 0 for x in answered),
        "preemptions": preemptions,
        "maps of a layer": max(maps),
        "most rows of raw pages": load.most_rows,
        "mean KL": sum(found) / len(found),
        "largest KL of a request": max(found),
        "limit": LIMITS[backend],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", choices=list(LIMITS), default="SIXFOLD_8BIT")
    print(json.dumps(soak(**vars(parser.parse_args())), indent=1))


if __name__ == "__main__":
    main()
