"""Find the sentences of a text that are most like a query, among compressed vectors.

    python examples/search_a_text.py "a storm at sea" --file book.txt

The vectors count the words and word pairs of a sentence in 1,024 hashed buckets: simple, made in a
moment and without a download. Put embeddings of your own in their place.
"""

import argparse
import re
import zlib
from itertools import pairwise
from pathlib import Path

import torch
from shared import read

import sixfold

DIM = 1024


def embed(sentences: list[str]) -> torch.Tensor:
    """Vectors [sentences, DIM] of length 1; rare words count more."""
    counts = torch.zeros(len(sentences), DIM)
    for row, sentence in zip(counts, sentences, strict=True):
        words = re.findall(r"\w+", sentence.lower())
        for term in [*words, *map(" ".join, pairwise(words))]:
            row[zlib.crc32(term.encode()) % DIM] += len(term)
    return torch.nn.functional.normalize(counts)


def main() -> None:
    """Index the sentences' vectors and print those nearest to the query."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("query", nargs="?", default="the light in the window")
    parser.add_argument("--file", type=Path, help="a text (UTF-8)")
    parser.add_argument("--bits", type=int, default=4)
    asked = parser.parse_args()

    sentences = [s.strip() for s in re.split(r"(?<=[.!?])\s+", read(asked.file)) if s.strip()]
    vectors = embed(sentences)
    index = sixfold.Index(dim=DIM, bits=asked.bits)
    index.add(vectors)
    print(f"{len(sentences)} sentences: {index.nbytes:,} bytes instead of {vectors.nbytes:,}")
    scores, ids = index.search(embed([asked.query])[0], k=3)
    for score, id in zip(scores, ids, strict=True):
        if id >= 0:
            print(f"{score:.2f}  {sentences[id]}")


if __name__ == "__main__":
    main()
