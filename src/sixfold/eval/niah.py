"""Needle in a haystack: does the model still find what it was told long ago?

One document hides a needle at every depth. It is prefilled once; then each needle is asked for on
a fork of the filled cache, so that question and answer read the document from the codes. An answer
counts when every digit is right under greedy decoding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import takewhile
from random import Random
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from sixfold.errors import SixfoldError
from sixfold.eval.caches import MakeCache, fork, half_precision_bytes, held_bytes
from sixfold.eval.checkpoint import Checkpoint
from sixfold.eval.needles import (
    NAMES,
    Needle,
    document,
    hide,
    is_exact,
    make_needles,
    split_sentences,
)
from sixfold.eval.progress import Progress, Steps, no_progress
from sixfold.integrations.transformers.keyword import cache_argument

# Tokens of a document for the question, and for merges that differ across sentence boundaries.
SLACK = 16


@dataclass(frozen=True, slots=True)
class Cell:
    """Needles of one depth in documents of one length.

    Attributes:
        tokens: Length of the documents asked for.
        depth: Fraction of the document that comes before the needle.
        asked: Needles asked for.
        exact: Needles whose every digit came back.
    """

    tokens: int
    depth: float
    asked: int
    exact: int


@dataclass(frozen=True, slots=True)
class Retrieval:
    """The grid of lengths and depths for one cache.

    Attributes:
        cells: One for every length and depth.
        nbytes: Bytes held after the last, longest document.
        plain_nbytes: 16-bit bytes of the same tokens.
    """

    cells: tuple[Cell, ...]
    nbytes: int = 0
    plain_nbytes: int = 0

    @property
    def bits_per_value(self) -> float:
        """Bits held a key or value coordinate, everything counted."""
        return 16 * self.nbytes / self.plain_nbytes if self.plain_nbytes else 0.0

    @property
    def asked(self) -> int:
        """Needles asked for in all."""
        return sum(cell.asked for cell in self.cells)

    @property
    def exact(self) -> int:
        """Needles retrieved exactly."""
        return sum(cell.exact for cell in self.cells)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        counts = {"asked": self.asked, "exact": self.exact}
        return {**counts, "bits_per_value": self.bits_per_value, **asdict(self)}


@dataclass(frozen=True, slots=True)
class Questions:
    """A tokenized document and the questions about it.

    Attributes:
        context: Tokens up to where the questions begin to differ from the document.
        tails: For every needle the tokens that follow the context, up to its cue's end.
        needles: What is asked for, from the shallowest to the deepest.
    """

    context: Int[Tensor, " tokens"]
    tails: tuple[Int[Tensor, " _"], ...]
    needles: tuple[Needle, ...]


def build_questions(
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    depths: Sequence[float],
    tokens: int,
    rng: Random,
) -> Questions:
    """Hide one needle a depth in about, and at most, `tokens` tokens of running text.

    Raises:
        SixfoldError: The text is too short for such a document, or the document for its needles.
    """
    needles = make_needles(rng, len(depths))
    statements = token_count(tokenizer, " ".join(needle.statement for needle in needles))
    text = excerpt(tokenizer, sentences, tokens, statements, rng)
    asked = [document(text, needles, depths, needle) for needle in needles]
    plain: list[int] = tokenizer(hide(text, needles, depths), verbose=False)["input_ids"]
    questions: list[list[int]] = [tokenizer(one, verbose=False)["input_ids"] for one in asked]
    # Tokenized whole and cut afterwards: tokens need not fall where the question begins.
    alike = takewhile(lambda tokens: len(set(tokens)) == 1, zip(plain, *questions, strict=False))
    shared = sum(1 for _ in alike)
    return Questions(
        context=torch.tensor(plain[:shared], device="cpu"),
        tails=tuple(torch.tensor(ids[shared:], device="cpu") for ids in questions),
        needles=tuple(needles),
    )


def retrieve(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    caches: Mapping[str, MakeCache],
    *,
    lengths: Sequence[int],
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    documents: int = 1,
    seed: int = 0,
    forced: bool = False,
    progress: Progress = no_progress,
    checkpoint: Checkpoint | None = None,
) -> dict[str, Retrieval]:
    """Ask for every needle of every document through every cache.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        text: The haystack; excerpts of it start at sentences drawn at random.
        caches: What to measure, by name.
        lengths: Document lengths in tokens.
        depths: Where in a document a needle is hidden, 0 first to 1 last.
        documents: Documents a length; each asks for one needle a depth.
        seed: Seed of excerpts, names and numbers; every cache sees the same documents.
        forced: Feed the right answer in one pass and see whether each of its tokens, and no digit
            after them, would have been chosen. That finds what greedy decoding finds, several times
            faster, except that the answer does not read its own first digits from codes.
        progress: Called after every document and cache.
        checkpoint: Remembers documents that were read.

    Returns:
        The grid of every name.

    Raises:
        SixfoldError: A depth lies outside the document, or the text is too short.
    """
    if not 1 <= len(depths) <= len(NAMES) or not all(0 <= depth <= 1 for depth in depths):
        raise SixfoldError(f"expected 1 to {len(NAMES)} depths from 0 to 1, got {list(depths)}")
    sentences, rng = split_sentences(text), Random(seed)
    hits = {name: {(size, depth): 0 for size in lengths for depth in depths} for name in caches}
    steps = Steps(progress, len(lengths) * documents * len(caches))
    held: dict[str, tuple[int, int]] = {}
    checkpoint = Checkpoint() if checkpoint is None else checkpoint
    sizes = [size for size in sorted(lengths) for _ in range(documents)]
    for number, size in enumerate(sizes):
        questions = build_questions(tokenizer, sentences, depths, size, rng)
        for name, make_cache in caches.items():
            ask = partial(_ask_all, model, tokenizer, questions, make_cache, forced)
            found, *nbytes = checkpoint.once(f"document {number}, {name}", ask)
            held[name] = nbytes[0], nbytes[1]
            for depth, hit in zip(depths, found, strict=True):
                hits[name][size, depth] += hit
            steps.done(name)
    return {
        name: Retrieval(
            tuple(Cell(*key, documents, exact) for key, exact in grid.items()), *held[name]
        )
        for name, grid in hits.items()
    }


def token_count(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def excerpt(
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    tokens: int,
    hidden: int,
    rng: Random,
) -> list[str]:
    """Consecutive sentences, going round at the end of the text.

    Args:
        tokenizer: Counts tokens.
        sentences: Of the text.
        tokens: Most of the document.
        hidden: Those of what will be hidden in it.
        rng: Draws the first sentence.
    """
    if not sentences:
        raise SixfoldError("the text has no sentences: give a longer one")
    budget = tokens - hidden - SLACK
    if budget <= 0:
        raise SixfoldError(
            f"documents of {tokens} tokens are too short for what is to be hidden in them: "
            f"at least {hidden + SLACK + 1} are needed"
        )
    counts = [token_count(tokenizer, sentence) for sentence in sentences]
    if sum(counts) < budget:
        raise SixfoldError(
            f"the text has {sum(counts)} tokens, too few to fill {budget} without repeating "
            "itself: give a longer text or shorter documents"
        )
    start, chosen, used = rng.randrange(len(sentences)), list[str](), 0
    for offset in range(len(sentences)):
        index = (start + offset) % len(sentences)
        if used + counts[index] > budget:
            break
        chosen.append(sentences[index])
        used += counts[index]
    return chosen


@torch.no_grad()
def _ask_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Questions,
    make_cache: MakeCache,
    forced: bool,
) -> tuple[list[bool], int, int]:
    """Which needles are found; bytes held, and those of the same tokens at 16 bits."""
    cache = make_cache(model)
    context = questions.context[None].to(model.device)
    model.base_model(input_ids=context, **cache_argument(cache), use_cache=True)
    answers = []
    for needle, tail in zip(questions.needles, questions.tails, strict=True):
        answer = torch.tensor(
            tokenizer(needle.answer, add_special_tokens=False)["input_ids"], device="cpu"
        )
        if forced:
            ids = _would_choose(model, torch.cat((tail, answer)), fork(cache), len(answer) + 1)
        else:
            # One token more than the answer: a number that goes on is a wrong number.
            ids = greedy(model, tail.to(model.device), fork(cache), len(answer) + 1)
        answers.append(is_exact(str(tokenizer.decode(ids)), needle))
    return answers, held_bytes(cache), half_precision_bytes(cache)


def _would_choose(
    model: PreTrainedModel, ids: Int[Tensor, " tokens"], cache: Cache, last: int
) -> Int[Tensor, " last"]:
    """The most likely token after each of the last `last` tokens of `ids`, itself not followed."""
    ids = ids[None].to(model.device)
    out = model(input_ids=ids, **cache_argument(cache), use_cache=True, logits_to_keep=last)
    chosen: Tensor = out.logits[0].argmax(-1)
    return chosen


@torch.no_grad()
def greedy(
    model: PreTrainedModel, ids: Int[Tensor, " tokens"], cache: Cache, steps: int
) -> Int[Tensor, " steps"]:
    """Continue a cache by `ids` and then by the most likely token, `steps` times."""
    chosen: list[Tensor] = []
    for _ in range(steps):
        out = model(input_ids=ids[None], **cache_argument(cache), use_cache=True)
        ids = out.logits[0, -1:].argmax(-1)
        chosen.append(ids)
    return torch.cat(chosen)
