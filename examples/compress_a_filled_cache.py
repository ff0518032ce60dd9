"""Compress the cache that any attention has already filled, and go on with it.

    python examples/compress_a_filled_cache.py --model Qwen/Qwen2.5-1.5B-Instruct --bits 3

Without arguments: the small model and the text inside the package, nothing is downloaded.
"""

import argparse
from pathlib import Path

import torch
from shared import load, read
from transformers import DynamicCache

import sixfold
from sixfold.integrations.transformers import cache_argument


def main() -> None:
    """Fill a `DynamicCache`, compress it, and compare what the model says next."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded", help="a hub name or a directory")
    parser.add_argument("--file", type=Path, help="a text (UTF-8)")
    parser.add_argument("--bits", type=float, default=4)
    asked = parser.parse_args()

    model, tokenizer = load(asked.model)
    ids = tokenizer(read(asked.file), return_tensors="pt")["input_ids"]
    full = DynamicCache(config=model.config)
    with torch.no_grad():
        model.base_model(ids[:, :-1], **cache_argument(full))
        small = sixfold.TurboQuantCache.from_cache(full, model, bits=asked.bits)
        print(small)
        exact = model(ids[:, -1:], **cache_argument(full)).logits[0, -1].softmax(-1)
        found = model(ids[:, -1:], **cache_argument(small)).logits[0, -1].softmax(-1)
    for name, probabilities in (("uncompressed", exact), ("compressed", found)):
        best = probabilities.topk(3)
        words = [tokenizer.decode(token) for token in best.indices]
        print(name, [f"{word!r} {p:.3f}" for word, p in zip(words, best.values, strict=True)])


if __name__ == "__main__":
    main()
