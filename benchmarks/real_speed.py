"""A real model from end to end: the first token, tokens a second, and the memory it takes.

    python -m benchmarks.real_speed MODEL --text BOOK --tokens 1024,4096,8192 --json FILE

Every measurement is a process of its own, so that the memory it shows is its own; contenders take
turns, as often as `--rounds` says. The prompt is one forward pass, as in `generate`; after it
tokens are chosen greedily. Rows of other models and lengths stay in the file.
"""

import argparse
import ctypes
import gc
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from benchmarks import machine
from benchmarks.peers import cache_bytes, installed_peers
from benchmarks.rows import beside
from sixfold.cache import CachePolicy
from sixfold.eval.caches import MakeCache, compressed, uncompressed
from sixfold.eval.speed import contender_name
from sixfold.eval.timing import Quartiles, time_once
from sixfold.integrations.transformers.keyword import cache_argument
from sixfold.packing import Bits

BASELINE = "transformers DynamicCache, sdpa"
WARM = 64
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True, slots=True)
class Question:
    """What is measured by one process.

    Attributes:
        model: A directory, or a name on the hub.
        text: What it reads.
        tokens: Tokens of the prompt.
        steps: Tokens generated after it.
        bits: Of our caches.
        contender: A key of `caches(bits)`.
    """

    model: str
    text: Path
    tokens: int
    steps: int
    bits: Sequence[Bits]
    contender: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What a process has measured.

    Attributes:
        first_token_seconds: From the prompt to its last logits, everything included.
        step_seconds: The median step.
        prefill_bytes: Most memory of the process during the prompt, beyond what it had before.
        step_bytes: Most memory of the process during the steps, likewise.
        cache_bytes: What the cache holds after the last step.
    """

    first_token_seconds: float
    step_seconds: float
    prefill_bytes: int
    step_bytes: int
    cache_bytes: int


def caches(bits: Sequence[Bits]) -> dict[str, MakeCache]:
    """All contenders: the uncompressed cache, those of transformers that are installed, ours."""
    ours = {contender_name(width, CachePolicy.code): compressed(width) for width in bits}
    return {BASELINE: uncompressed, **installed_peers(), **ours}


def answer(question: Question) -> Answer | None:
    """Measure in this process, which nothing else was measured in before.

    Returns:
        What was found; None where transformers refuses such a cache for the model.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(question.model, dtype=torch.bfloat16).eval()
    ids = prompt(question)
    make = caches(question.bits)[question.contender]
    try:
        warm = make(model)
    except ValueError as error:
        print(f"{question.contender}: {error}")
        return None
    # Threads, kernels and buffers are there from then on.
    generate(model, ids[:, :WARM], warm, 2)
    del warm
    give_back()
    held = memory()
    cache = make(model)
    (first, *steps), peaks = generate(model, ids, cache, question.steps)
    prefill, step = (max(peak - held, 0) for peak in peaks)
    return Answer(first, Quartiles.of(steps).median, prefill, step, cache_bytes(cache))


def prompt(question: Question) -> Tensor:
    """The first tokens of the text, [1, tokens]."""
    tokenizer = AutoTokenizer.from_pretrained(question.model)
    text = question.text.read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
    if ids.shape[1] < question.tokens:
        raise SystemExit(f"{question.text} has {ids.shape[1]} tokens, fewer than {question.tokens}")
    found: Tensor = ids[:, : question.tokens]
    return found


@torch.no_grad()
def generate(
    model: PreTrainedModel, ids: Tensor, cache: Any, steps: int
) -> tuple[list[float], tuple[int, int]]:
    """Seconds of the prompt and of every step; the most memory during the one and the others."""
    seconds, peaks = [], []

    def go_on() -> None:
        nonlocal ids
        out = model(input_ids=ids, **cache_argument(cache), use_cache=True, logits_to_keep=1)
        ids = out.logits[:, -1:].argmax(-1)

    forget_peak()
    for step in range(1 + steps):
        seconds.append(time_once(go_on))
        if step in (0, steps):
            peaks.append(memory("VmHWM"))
            give_back()
            forget_peak()
    first, last = peaks
    return seconds, (first, last)


def memory(field: str = "VmRSS") -> int:
    """Bytes of memory that this process holds, or has held at most (`VmHWM`)."""
    line = next(x for x in _STATUS.read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def give_back() -> None:
    """Return memory that is free but was kept by the allocator (glibc)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def forget_peak() -> None:
    """Let `VmHWM` begin anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(questions: Sequence[Question], rounds: int) -> Iterator[dict[str, Any]]:
    """A row for every question: medians over rounds, in which all take turns."""
    found: dict[Question, list[Answer]] = {question: [] for question in questions}
    spawn = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as alone:
        for _ in range(rounds):
            for question, answers in found.items():
                if one := alone.submit(answer, question).result():
                    answers.append(one)
                    print(question.contender, question.tokens, one, flush=True)
    for question, answers in found.items():
        if not answers:
            continue
        medians = {
            field.name: Quartiles.of([getattr(x, field.name) for x in answers]).median
            for field in fields(Answer)
        }
        yield {
            "model": Path(question.model).name,
            "tokens": question.tokens,
            "contender": question.contender,
            **medians,
            "rounds": [asdict(x) for x in answers],
        }


def main() -> None:
    """Measure one model at some lengths, and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a directory, or a name on the hub")
    parser.add_argument("--text", type=Path, required=True, help="what the model reads")
    parser.add_argument("--tokens", type=_numbers(int), default=[1024, 4096], metavar="1024,4096")
    parser.add_argument("--bits", type=_numbers(float), default=[4.0, 2.5], metavar="4,2.5")
    parser.add_argument("--steps", type=int, default=32, help="tokens generated")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for tokens in arguments.tokens:
        given = arguments.model, arguments.text, tokens, arguments.steps, tuple(arguments.bits)
        questions = [Question(*given, contender) for contender in caches(arguments.bits)]
        rows += measure(questions, arguments.rounds)
        if arguments.json:
            kept = beside(rows, arguments.json, "model", "tokens", "contender")
            document = {"machine": machine.describe(), "steps": arguments.steps, "rows": kept}
            text = json.dumps(document, indent=2, allow_nan=False) + "\n"
            arguments.json.write_text(text, encoding="utf-8")


def _numbers(kind: type) -> Any:
    return lambda text: [kind(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
