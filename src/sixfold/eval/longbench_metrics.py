"""LongBench's metrics: what fraction of a point a prediction is worth against one reference.

Source: THUDM/LongBench `metrics.py` (MIT), for its English datasets. ROUGE-L is that of the
`rouge` package it uses: a set of words in common subsequences, sentence by sentence.
"""

import difflib
import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def qa_f1(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """F1 of the bags of words, without case, punctuation and articles."""
    mine, theirs = (Counter(_normalized(text).split()) for text in (prediction, reference))
    common = (mine & theirs).total()
    return 2 * common / (mine.total() + theirs.total()) if common else 0.0


def rouge_l(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """F of the words that common subsequences of their sentences share."""
    mine, theirs = _sentences(prediction), _sentences(reference)
    if not mine or not theirs:
        return 0.0
    shared = {word for one in theirs for other in mine for word in _common_subsequence(one, other)}
    precision, recall = (
        len(shared) / max(len({word for part in parts for word in part}), 1)
        for parts in (mine, theirs)
    )
    return 2 * precision * recall / (precision + recall + 1e-8)


def classification(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """One over the classes named, if the right one is among them."""
    named = [name for name in classes if name in prediction]
    # A class whose name is part of the right one's was not meant. The original removes from the
    # list it walks over, and so skips the one after each; scores are to be its own.
    for name in named:
        if name in reference and name != reference:
            named.remove(name)
    return 1 / len(named) if reference in named else 0.0


def count(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """Share of the numbers in the prediction that are right."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(reference) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """The same for the number of the paragraph that the reference names."""
    (paragraph, *_) = re.findall(r"Paragraph (\d+)", reference)
    return count(prediction, paragraph)


def code_similarity(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """Similarity of the first line that is code, in whole percent."""
    lines = prediction.lstrip("\n").split("\n")
    code = next((x for x in lines if not any(mark in x for mark in ("`", "#", "//"))), "")
    if not code or not reference:
        return 0.0
    return round(100 * difflib.SequenceMatcher(None, code, reference).ratio()) / 100


def _sentences(text: str) -> list[list[str]]:
    # A sentence of spaces is one empty word to the original.
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _normalized(text: str) -> str:
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION))


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """A longest common subsequence; where several are, the one the `rouge` package finds."""
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, one in enumerate(first, 1):
        for j, other in enumerate(second, 1):
            above = max(table[i - 1][j], table[i][j - 1])
            table[i][j] = table[i - 1][j - 1] + 1 if one == other else above
    words, i, j = [], len(first), len(second)
    while i and j:
        if first[i - 1] == second[j - 1]:
            words.append(first[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words
