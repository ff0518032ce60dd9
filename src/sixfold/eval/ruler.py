"""Retrieval beyond one needle: several keys, several values, chains of variables.

Own implementation of three of RULER's task definitions (arXiv:2404.06654 §3), phrased as text that
a base model can continue: facts are hidden at random depths of running text, and the document ends
with the beginning of the answer. Answers count wherever they appear in what follows.
"""

import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from random import Random
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sixfold.errors import SixfoldError
from sixfold.eval.caches import MakeCache, half_precision_bytes, held_bytes
from sixfold.eval.checkpoint import Checkpoint
from sixfold.eval.needles import NAMES, Needle, make_needles, split_sentences
from sixfold.eval.niah import excerpt, greedy, token_count
from sixfold.eval.progress import Progress, Steps, no_progress
from sixfold.integrations.transformers.keyword import cache_argument

KEYS, VALUES, HOPS = 4, 4, 4
"""Facts of a multi-key, values of a multi-value and assignments of a variable-tracking document."""


@dataclass(frozen=True, slots=True)
class Puzzle:
    """Facts to hide, and what is asked about them.

    Attributes:
        facts: Sentences, in the order in which they must appear.
        cue: How the document ends.
        answers: What must follow, in any order.
    """

    facts: tuple[str, ...]
    cue: str
    answers: tuple[str, ...]


def multi_key(rng: Random) -> Puzzle:
    """One of several names is asked for; the others distract."""
    needles = make_needles(rng, KEYS)
    asked = rng.choice(needles)
    return Puzzle(tuple(n.statement for n in needles), asked.cue, (str(asked.number),))


def multi_value(rng: Random) -> Puzzle:
    """One name has several numbers, told apart from each other; all are asked for."""
    name = rng.choice(NAMES)
    needles = [Needle(name, needle.number) for needle in make_needles(rng, VALUES)]
    facts = tuple(needle.statement for needle in needles)
    cue = f"The {VALUES} secret numbers of {name} are"
    return Puzzle(facts, cue, tuple(str(needle.number) for needle in needles))


def variable_tracking(rng: Random) -> Puzzle:
    """A number is assigned to a variable, that to another, and so on; all holders are asked for."""
    names = ["".join(rng.sample(string.ascii_uppercase, 3)) for _ in range(HOPS + 1)]
    if len(set(names)) < len(names):
        return variable_tracking(rng)
    number = rng.randrange(10_000, 100_000)
    facts = [f"VAR {names[0]} = {number}."]
    facts += [f"VAR {later} = VAR {earlier}." for earlier, later in pairwise(names)]
    cue = f"The {len(names)} variables whose value is {number} are VAR"
    return Puzzle(tuple(facts), cue, tuple(names))


TASKS: dict[str, Callable[[Random], Puzzle]] = {
    "multikey": multi_key,
    "multivalue": multi_value,
    "variables": variable_tracking,
}


@dataclass(frozen=True, slots=True)
class Score:
    """How one cache did in one task.

    Attributes:
        asked: Documents.
        exact: Documents of which every answer came back.
        recall: Answers that came back over answers expected.
        bits_per_value: Bits held a key or value coordinate after the last document.
    """

    asked: int
    exact: int
    recall: float
    bits_per_value: float

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)


def found_share(continuation: str, answers: Sequence[str]) -> float:
    """Share of the answers that appear in the continuation as words of their own."""
    words = set(re.findall(r"\w+", continuation))
    return sum(answer in words for answer in answers) / len(answers)


def measure_retrieval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    caches: Mapping[str, MakeCache],
    *,
    tasks: Sequence[str] = tuple(TASKS),
    tokens: int = 1024,
    documents: int = 4,
    seed: int = 0,
    progress: Progress = no_progress,
    checkpoint: Checkpoint | None = None,
) -> dict[str, dict[str, Score]]:
    """Let a model answer every document through every cache, under greedy decoding.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        text: What the facts are hidden in.
        caches: What to measure, by name.
        tasks: Any of `TASKS`.
        tokens: Length of a document, at most.
        documents: Documents a task.
        seed: Seed of excerpts and facts; every cache sees the same documents.
        progress: Called after every document and cache.
        checkpoint: Remembers documents that were answered.

    Returns:
        The scores of every task, by name of the cache.

    Raises:
        SixfoldError: There is no such task, or the text is too short for the documents.
    """
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise SixfoldError(f"there is no task {unknown[0]!r}; expected some of {', '.join(TASKS)}")
    rng, sentences = Random(seed), split_sentences(text)
    checkpoint = Checkpoint() if checkpoint is None else checkpoint
    results: dict[str, dict[str, Score]] = {}
    steps = Steps(progress, len(tasks) * documents * len(caches))
    for task in tasks:
        shares: dict[str, list[float]] = {name: [] for name in caches}
        bits = dict.fromkeys(caches, 0.0)
        for number in range(documents):
            puzzle = TASKS[task](rng)
            context, tail = _document(tokenizer, sentences, puzzle, tokens, rng)
            for name, make_cache in caches.items():
                answer = partial(_continue, model, tokenizer, context, tail, puzzle, make_cache)
                said, bits[name] = checkpoint.once(f"{task} {number}, {name}", answer)
                shares[name].append(found_share(said, puzzle.answers))
                steps.done(name)
        results[task] = {
            name: Score(documents, found.count(1.0), sum(found) / documents, bits[name])
            for name, found in shares.items()
        }
    return results


def _document(
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    puzzle: Puzzle,
    tokens: int,
    rng: Random,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of text with the facts hidden in it, and those of the question at its end."""
    facts = token_count(tokenizer, " ".join((*puzzle.facts, puzzle.cue)))
    parts = excerpt(tokenizer, sentences, tokens, facts, rng)
    places = sorted(rng.randrange(len(parts) + 1) for _ in puzzle.facts)
    for place, fact in reversed(list(zip(places, puzzle.facts, strict=True))):
        parts.insert(place, f" {fact}")
    body = "".join(parts).strip()
    ids: list[int] = tokenizer(f"{body}\n\n{puzzle.cue}", verbose=False)["input_ids"]
    plain: list[int] = tokenizer(body, verbose=False)["input_ids"]
    shared = next(
        (i for i, (a, b) in enumerate(zip(ids, plain, strict=False)) if a != b), len(plain)
    )
    return torch.tensor(ids[:shared], device="cpu"), torch.tensor(ids[shared:], device="cpu")


@torch.no_grad()
def _continue(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    context: torch.Tensor,
    tail: torch.Tensor,
    puzzle: Puzzle,
    make_cache: MakeCache,
) -> tuple[str, float]:
    cache = make_cache(model)
    model.base_model(
        input_ids=context[None].to(model.device), **cache_argument(cache), use_cache=True
    )
    bits = 16 * held_bytes(cache) / half_precision_bytes(cache)
    # Twice the answers, for words between them.
    steps = 2 * token_count(tokenizer, ", ".join(puzzle.answers)) + 4
    ids = greedy(model, tail.to(model.device), cache, steps)
    return str(tokenizer.decode(ids)), bits
