"""Training rows: book text, needle documents and repeated random tokens, made on the fly."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from tokenizers import Tokenizer

from sixfold.eval.needles import NAMES, Needle, make_needles, split_sentences

HELD_OUT = "Bram_Stoker_Dracula"
BOS_ID = 0
FIRST_ORDINARY_ID = 2

Row = tuple[np.ndarray, np.ndarray]
"""Token ids and, for each, the weight of the loss of predicting it."""


def clean(text: str) -> str:
    """Drop headings, rules and emphasis marks of a Markdown book; keep its paragraphs."""
    kept = [line.strip() for line in text.splitlines() if not re.match(r"\s*(#|-{3,})", line)]
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[*_]", "", "\n".join(kept))).strip()


def read_books(corpus: Path) -> dict[str, str]:
    """Read every .md and .txt book of a folder, by file stem, in a fixed order."""
    paths = sorted(p for p in corpus.iterdir() if p.suffix in {".md", ".txt"})
    return {p.stem: clean(p.read_text(encoding="utf-8")) for p in paths}


class Corpus:
    """Tokenised sentences of all books, in one flat array with the sentences' offsets."""

    def __init__(self, books: list[str], tokenizer: Tokenizer) -> None:
        sentences = [s for book in books for s in split_sentences(book)]
        encoded = tokenizer.encode_batch_fast(sentences, add_special_tokens=False)
        lengths = [len(e.ids) for e in encoded]
        self.tokens = np.concatenate([np.array(e.ids, dtype=np.int64) for e in encoded])
        self.starts = np.concatenate([[0], np.cumsum(lengths)])

    def sentence(self, index: int) -> np.ndarray:
        """Return one sentence's tokens."""
        return self.tokens[self.starts[index] : self.starts[index + 1]]

    def chunk(self, rng: Random, length: int) -> np.ndarray:
        """Return running text from a random place."""
        start = rng.randrange(len(self.tokens) - length)
        return self.tokens[start : start + length]

    def running(self, rng: Random, length: int) -> list[np.ndarray]:
        """Return consecutive sentences of about ``length`` tokens in all."""
        first = rng.randrange(len(self.starts) - 1)
        last = int(np.searchsorted(self.starts, self.starts[first] + length))
        return [self.sentence(i) for i in range(first, min(last, len(self.starts) - 1))]

    def shuffled(self, rng: Random, length: int) -> list[np.ndarray]:
        """Return sentences from all over the books, of about ``length`` tokens in all."""
        parts: list[np.ndarray] = []
        while length > 0:
            parts.append(self.sentence(rng.randrange(len(self.starts) - 1)))
            length -= len(parts[-1])
        return parts


@dataclass(frozen=True)
class Mixture:
    """What a row is made of at one point of the curriculum."""

    repeats: float
    needles: float
    longest_period: int
    small_alphabets: float
    single_pattern: float
    answer_weight: float = 4.0


class RowMaker:
    """Makes rows of one length; all randomness comes from the generator it is given."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, rng: Random) -> None:
        self.corpus = corpus
        self.rng = rng
        self.vocab_size = tokenizer.get_vocab_size()
        self._encode: Callable[[str], list[int]] = lambda text: (
            tokenizer.encode(text, add_special_tokens=False).ids
        )
        self.digits = self._encode("0123456789")

    def batch(self, rows: int, length: int, mixture: Mixture) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and loss weights, each ``[rows, length + 1]``."""
        made = [self.row(length + 1, mixture) for _ in range(rows)]
        return np.stack([ids for ids, _ in made]), np.stack([weights for _, weights in made])

    def row(self, length: int, mixture: Mixture) -> Row:
        """Make one row of the kind the mixture draws."""
        draw = self.rng.random()
        if draw < mixture.repeats:
            body, weights = self.repeats(length - 1, mixture)
        elif draw < mixture.repeats + mixture.needles:
            body, weights = self.needles(length - 1, mixture.answer_weight)
        else:
            body = self.corpus.chunk(self.rng, length - 1)
            weights = np.ones(length - 1, dtype=np.float32)
        return np.append([BOS_ID], body), np.append(np.zeros(1, dtype=np.float32), weights)

    def random_tokens(self, count: int, small_alphabets: float = 0.5) -> np.ndarray:
        """Draw tokens from the whole vocabulary, from a few of them, or digits.

        Out of a small alphabet the same token comes with many successors, so copying needs
        a match of several tokens: what telling one name's number from another's needs too.
        """
        kind = self.rng.random()
        if kind < 0.4 * small_alphabets:
            alphabet = self.digits
        elif kind < small_alphabets:
            alphabet = self.rng.sample(range(FIRST_ORDINARY_ID, self.vocab_size), 24)
        else:
            alphabet = list(range(FIRST_ORDINARY_ID, self.vocab_size))
        return np.array(self.rng.choices(alphabet, k=count), dtype=np.int64)

    def repeats(self, length: int, mixture: Mixture) -> Row:
        """Return random patterns, each repeated: what induction grows on.

        A row of one pattern is learnt by degrees: copying any earlier token helps, the token
        after the last copy of the present one helps most.  Rows of several patterns give
        nothing to begin on, but later teach to look at the right one.
        """
        parts: list[np.ndarray] = []
        weights: list[np.ndarray] = []
        room = length
        segment = length if self.rng.random() < mixture.single_pattern else max(96, length // 4)
        while room > 0:
            period = self.rng.randint(3, max(4, min(mixture.longest_period, room // 2)))
            copies = max(2, segment // period + 1)
            pattern = self.random_tokens(period, mixture.small_alphabets)
            parts.append(np.tile(pattern, copies))
            weight = np.ones(period * copies, dtype=np.float32)
            weight[:period] = 0.0  # the first copy cannot be foretold: noise, not a lesson
            weights.append(weight)
            room -= len(weight)
        return np.concatenate(parts)[:length], np.concatenate(weights)[:length]

    def haystack(self, length: int) -> list[np.ndarray]:
        """Return sentences of a novel, shuffled ones, or no language at all."""
        kind = self.rng.random()
        if kind < 0.6:
            return self.corpus.running(self.rng, length)
        if kind < 0.85:
            return self.corpus.shuffled(self.rng, length)
        pieces = max(1, length // 24)
        if kind < 0.93:
            return [self.corpus.chunk(self.rng, 24) for _ in range(pieces)]
        return [self.random_tokens(24) for _ in range(pieces)]

    def names(self, count: int) -> list[Needle]:
        """Draw needles; half the time their names are made up, so no name is special."""
        if self.rng.random() < 0.5:
            return make_needles(self.rng, count)
        made_up = ["".join(self.rng.choices(_SYLLABLES, k=2)).capitalize() for _ in range(40)]
        return make_needles(self.rng, count, sorted(set(made_up)))

    def needles(self, length: int, answer_weight: float) -> Row:
        """Hide needles in a haystack and ask for some of them, the weight on the answers."""
        needles = self.names(self.rng.randint(1, min(16, length // 48)))
        asked = self.rng.sample(needles, min(len(needles), self.rng.randint(1, 4)))
        hidden = [np.array(self._encode(f" {n.statement}")) for n in needles]
        gap = self.rng.choice([" ", "\n\n"])
        questions = [self.question(n, gap, answer_weight) for n in asked]
        room = length - sum(map(len, hidden)) - sum(len(ids) for ids, _ in questions)
        parts = self.haystack(room)
        parts[-1] = parts[-1][: max(0, len(parts[-1]) + room - sum(map(len, parts)))]
        for statement in hidden:
            parts.insert(self.rng.randint(0, len(parts)), statement)
        ids = np.concatenate([*parts, *(ids for ids, _ in questions)])
        weights = np.ones(len(ids), dtype=np.float32)
        tail = np.concatenate([weight for _, weight in questions])
        weights[-len(tail) :] = tail
        return self.fit(ids, weights, length)

    def question(self, needle: Needle, gap: str, answer_weight: float) -> Row:
        """Return a restated needle with the weight on the tokens of its number."""
        cue, answer = self._encode(gap + needle.cue), self._encode(needle.answer)
        weights = np.ones(len(cue) + len(answer) + 1, dtype=np.float32)
        weights[len(cue) : -1] = answer_weight
        return np.array(cue + answer + self._encode(".")), weights

    def fit(self, ids: np.ndarray, weights: np.ndarray, length: int) -> Row:
        """Make a row exactly long enough, with text after the questions where it is short."""
        short = length - len(ids)
        if short > 0:
            ids = np.concatenate([ids, self.corpus.chunk(self.rng, short)])
            weights = np.concatenate([weights, np.ones(short, dtype=np.float32)])
        return ids[:length], weights[:length]


_SYLLABLES = (
    "al an ar be bel cor da den dor el en fa fen gar gil ha hol is jo kel ka la lin lo mar mi "
    "mor na nel or pa per qui ra rin ro sa sel ta tor ul va vin wen win yo za"
).split()

assert len(NAMES) > 16  # the most needles a document can hold
