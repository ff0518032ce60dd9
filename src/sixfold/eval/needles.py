"""Needle documents: long text in which a few facts are hidden and one is asked for.

A *needle* is a sentence such as ``The secret number of Miriam is 48213.``.  Several are
hidden in one *haystack*, and the document ends with the beginning of one of them, so that a
model can only continue correctly by finding the sentence with the same name.  The score is
exact match of all digits under greedy decoding.

Training, the demo and the tests share this module; it needs nothing but the standard library.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

NAMES: tuple[str, ...] = tuple(
    """
    Abigail Adelaide Agnes Albert Alice Ambrose Amos Anselm Arthur Barnaby Beatrice Benedict
    Bernard Bertha Blanche Bridget Caleb Cecily Chester Clara Clement Conrad Cora Cyril Daphne
    Deborah Dora Duncan Edgar Edith Edmund Elsie Enoch Ephraim Ernest Esther Eugene Felix Flora
    Florence Frances Gertrude Gideon Gilbert Godfrey Grace Harriet Harvey Hector Helena Henry
    Herbert Hester Hilda Horace Hugh Ida Irene Isaac Isabel Ivan Jasper Jerome Joan Jonas Judith
    Julius Laura Leonard Lionel Louisa Lucy Luther Mabel Magnus Marian Martha Matilda Maurice
    Mercy Miles Miriam Morris Nathan Nora Octavia Olive Oscar Oswald Patience Percy Phoebe Quentin
    Rachel Ralph Reuben Rosamund Rufus Rupert Ruth Samuel Selina Silas Simon Stella Susan Sybil
    Theodore Thomas Timothy Ursula Vera Victor Viola Walter Wilfred Winifred Zachary
    """.split()
)

DIGITS = 5
"""Digits in every secret number; the first is never zero."""

_SENTENCE = re.compile(r"\s*\S.*?(?:[.!?][\"'\u2019\u201d)]*(?=\s)|\Z)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Needle:
    """One fact: the secret number of a name."""

    name: str
    number: int

    @property
    def cue(self) -> str:
        """The beginning of the statement, up to where the number is due."""
        return f"The secret number of {self.name} is"

    @property
    def answer(self) -> str:
        """What must follow the cue, leading space included."""
        return f" {self.number}"

    @property
    def statement(self) -> str:
        """The sentence that is hidden in the haystack."""
        return f"{self.cue}{self.answer}."


def make_needles(rng: Random, count: int, names: Sequence[str] = NAMES) -> list[Needle]:
    """Draw ``count`` needles whose names and numbers are all different."""
    numbers = rng.sample(range(10 ** (DIGITS - 1), 10**DIGITS), count)
    drawn = rng.sample(names, count)
    return [Needle(name, number) for name, number in zip(drawn, numbers, strict=True)]


def split_sentences(text: str) -> list[str]:
    """Cut text into sentences, each with the white space *before* it, so ``"".join`` restores.

    White space at the very end of the text belongs to no sentence and is dropped.
    """
    return _SENTENCE.findall(text.rstrip())


def hide(sentences: Sequence[str], needles: Sequence[Needle], depths: Sequence[float]) -> str:
    """Join sentences with each needle's statement put in at its depth.

    A depth is the fraction of the sentences that come before the needle: 0 puts it first,
    1 puts it last.
    """
    if any(not 0.0 <= depth <= 1.0 for depth in depths):
        raise ValueError(f"depths must lie in [0, 1], got {list(depths)}")
    parts = list(sentences)
    placed = sorted(zip(depths, needles, strict=True), key=lambda pair: pair[0], reverse=True)
    for depth, needle in placed:
        parts.insert(round(depth * len(sentences)), f" {needle.statement}")
    return "".join(parts).strip()


def document(
    sentences: Sequence[str], needles: Sequence[Needle], depths: Sequence[float], asked: Needle
) -> str:
    """Return the haystack with its needles, ending in the cue of the needle asked for."""
    return f"{hide(sentences, needles, depths)}\n\n{asked.cue}"


def is_exact(continuation: str, needle: Needle) -> bool:
    """Whether a model's continuation of the cue begins with every digit and no more digits."""
    found = re.match(r"\s*(\d+)", continuation)
    return found is not None and int(found.group(1)) == needle.number
