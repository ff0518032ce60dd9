"""LongBench-E on a local copy of its data: answers through a cache, scored as the original does.

DIR holds one JSON-lines file a dataset, named after it (`qasper_e.jsonl` or `qasper.jsonl`), with
the fields of THUDM/LongBench: context, input, answers, all_classes, length. Its prompts
(`longbench_prompts.json`, MIT) are part of the benchmark: other words would be another one.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sixfold.errors import SixfoldError
from sixfold.eval.caches import MakeCache
from sixfold.eval.checkpoint import Checkpoint
from sixfold.eval.longbench_metrics import (
    classification,
    code_similarity,
    count,
    qa_f1,
    retrieval,
    rouge_l,
)
from sixfold.eval.niah import greedy
from sixfold.eval.progress import Progress, Steps, no_progress
from sixfold.integrations.transformers.keyword import cache_argument


@dataclass(frozen=True, slots=True)
class Dataset:
    """How one dataset is asked and scored.

    Attributes:
        metric: Points of a prediction against one reference.
        new_tokens: Tokens an answer may have.
        first_line: Whether only the first line of an answer counts.
        chat: Whether a chat model is asked through its template.
    """

    metric: Callable[[str, str, Sequence[str]], float]
    new_tokens: int
    first_line: bool = False
    chat: bool = True


# Metrics, lengths and exceptions are those of its `eval.py`, `pred.py` and `dataset2maxlen.json`.
DATASETS: dict[str, Dataset] = {
    "qasper": Dataset(qa_f1, 128),
    "multifieldqa_en": Dataset(qa_f1, 64),
    "hotpotqa": Dataset(qa_f1, 32),
    "2wikimqa": Dataset(qa_f1, 32),
    "gov_report": Dataset(rouge_l, 512),
    "multi_news": Dataset(rouge_l, 512),
    "trec": Dataset(classification, 64, first_line=True, chat=False),
    "triviaqa": Dataset(qa_f1, 32, first_line=True, chat=False),
    "samsum": Dataset(rouge_l, 128, first_line=True, chat=False),
    "passage_count": Dataset(count, 32),
    "passage_retrieval_en": Dataset(retrieval, 32),
    "lcc": Dataset(code_similarity, 64, chat=False),
    "repobench-p": Dataset(code_similarity, 64, chat=False),
}

BUCKETS = {"0-4k": 4000, "4-8k": 8000, "8k+": None}
"""Upper ends, in words, of the length classes of LongBench-E."""


@dataclass(frozen=True, slots=True)
class DatasetScore:
    """Points out of 100 of one cache.

    Attributes:
        asked: Questions.
        score: Mean points.
        by_length: Mean points of each of `BUCKETS`; None where it has no question.
    """

    asked: int
    score: float
    by_length: dict[str, float | None]

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)


def find_datasets(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Read the datasets that lie in a folder.

    Raises:
        SixfoldError: There is none, or a line is not a question of LongBench.
    """
    found = {}
    for name in DATASETS:
        for path in (folder / f"{name}_e.jsonl", folder / f"{name}.jsonl"):
            if path.is_file():
                found[name] = [_question(path, i, x) for i, x in _lines(path)]
                break
    if not found:
        raise SixfoldError(
            f"{folder} holds no LongBench data: expected files such as qasper_e.jsonl, for any of "
            f"{', '.join(DATASETS)}"
        )
    return found


def _lines(path: Path) -> list[tuple[int, str]]:
    lines = path.read_text(encoding="utf-8").split("\n")
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _question(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        question: dict[str, Any] = json.loads(line)
        missing = {"context", "input", "answers", "length"} - set(question)
    except (ValueError, TypeError) as error:
        raise SixfoldError(f"{path}, line {number}, is not a JSON object") from error
    if missing:
        raise SixfoldError(f"{path}, line {number}, lacks {', '.join(sorted(missing))}")
    return question


def prompt_of(name: str, question: Mapping[str, Any]) -> str:
    """The question as the dataset's template puts it."""
    text = (files("sixfold.eval") / "longbench_prompts.json").read_text(encoding="utf-8")
    template: str = json.loads(text)[name]
    # Not `format`: contexts hold braces of their own, and so could a template.
    return template.replace("{input}", question["input"]).replace("{context}", question["context"])


def measure_longbench(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Mapping[str, Sequence[Mapping[str, Any]]],
    caches: Mapping[str, MakeCache],
    *,
    max_tokens: int,
    chat: bool = False,
    questions: int | None = None,
    progress: Progress = no_progress,
    checkpoint: Checkpoint | None = None,
) -> dict[str, dict[str, DatasetScore]]:
    """Answer every question through every cache, under greedy decoding.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        data: Questions by dataset, as `find_datasets` reads them.
        caches: What to measure, by name.
        max_tokens: Longer prompts lose their middle, as in the original.
        chat: Ask through the tokenizer's chat template, where the original does.
        questions: Questions a dataset, at most.
        progress: Called after every question and cache.
        checkpoint: Remembers answers.

    Returns:
        Scores by dataset and cache.
    """
    chosen = {name: list(rows)[:questions] for name, rows in data.items()}
    checkpoint = Checkpoint() if checkpoint is None else checkpoint
    steps = Steps(progress, len(caches) * sum(map(len, chosen.values())))
    results: dict[str, dict[str, DatasetScore]] = {}
    for name, rows in chosen.items():
        points: dict[str, list[float]] = {cache: [] for cache in caches}
        for number, question in enumerate(rows):
            ids = _prompt_ids(tokenizer, name, question, max_tokens, chat)
            for cache, make_cache in caches.items():
                most = DATASETS[name].new_tokens
                answer = partial(_answer, model, tokenizer, ids, make_cache, most)
                said = checkpoint.once(f"{name} {number}, {cache}", answer)
                points[cache].append(score(name, said, question))
                steps.done(cache)
        lengths = [int(question["length"]) for question in rows]
        results[name] = {cache: _summary(found, lengths) for cache, found in points.items()}
    return results


def score(name: str, said: str, question: Mapping[str, Any]) -> float:
    """Points from 0 to 1 of an answer: those against the reference it fits best."""
    dataset = DATASETS[name]
    if dataset.first_line:
        said = said.lstrip("\n").split("\n")[0]
    classes = question.get("all_classes") or ()
    return max((dataset.metric(said, one, classes) for one in question["answers"]), default=0.0)


def _summary(points: Sequence[float], lengths: Sequence[int]) -> DatasetScore:
    buckets: dict[str, list[float]] = {label: [] for label in BUCKETS}
    for point, length in zip(points, lengths, strict=True):
        label = next(x for x, end in BUCKETS.items() if end is None or length < end)
        buckets[label].append(point)
    means = {label: 100 * sum(x) / len(x) if x else None for label, x in buckets.items()}
    return DatasetScore(len(points), 100 * sum(points) / max(len(points), 1), means)


def _prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    question: Mapping[str, Any],
    max_tokens: int,
    chat: bool,
) -> Int[Tensor, " tokens"]:
    prompt = prompt_of(name, question)
    ids: list[int] = tokenizer(prompt, verbose=False, add_special_tokens=False)["input_ids"]
    if len(ids) > max_tokens:
        half = max_tokens // 2
        prompt = str(tokenizer.decode(ids[:half])) + str(tokenizer.decode(ids[-half:]))
    if chat and DATASETS[name].chat:
        message = [{"role": "user", "content": prompt}]
        asked = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return torch.tensor(
            tokenizer(asked, verbose=False, add_special_tokens=False)["input_ids"], device="cpu"
        )
    return torch.tensor(tokenizer(prompt, verbose=False)["input_ids"], device="cpu")


@torch.no_grad()
def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Int[Tensor, " tokens"],
    make_cache: MakeCache,
    new_tokens: int,
) -> str:
    cache, ids = make_cache(model), ids.to(model.device)
    model.base_model(input_ids=ids[None, :-1], **cache_argument(cache), use_cache=True)
    said = greedy(model, ids[-1:], cache, new_tokens).tolist()
    if (end := tokenizer.eos_token_id) in said:
        said = said[: said.index(end)]
    return str(tokenizer.decode(said, skip_special_tokens=True))
