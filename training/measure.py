"""Measure the embedded model: held-out perplexity and exact needle retrieval by length."""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from sixfold.eval.needles import (
    DIGITS,
    Needle,
    document,
    is_exact,
    make_needles,
    split_sentences,
)
from training.data import HELD_OUT, read_books

NEEDLES_A_DOCUMENT = 4
LENGTHS = (256, 512, 1024, 1536, 2048, 3072, 4096)
HELD_OUT_CHARACTERS = 100_000
PERPLEXITY_LENGTH = 1024


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, tokenizer: Tokenizer, text: str, length: int) -> float:
    """Return the perplexity a token, in windows of ``length`` that each begin with BOS."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    windows = [ids[i : i + length - 1] for i in range(0, len(ids) - length + 2, length - 1)]
    total = 0.0
    for window in windows:
        row = torch.tensor([[model.config.bos_token_id, *window]])
        total += model(input_ids=row, labels=row, use_cache=False).loss.item()
    return math.exp(total / len(windows))


def make_prompt(
    tokenizer: Tokenizer, sentences: list[str], length: int, depth: float, rng: Random
) -> tuple[list[int], Needle]:
    """Return a document of at most ``length`` tokens, and the needle it asks for.

    The needle asked for lies at ``depth``; three with other names lie at random depths.
    """
    needles = make_needles(rng, NEEDLES_A_DOCUMENT)
    depths = [depth, *(rng.random() for _ in needles[1:])]
    most = length // 8  # more sentences than this never fit
    first = rng.randrange(max(1, len(sentences) - most))

    def encode(count: int) -> list[int]:
        text = document(sentences[first : first + count], needles, depths, needles[0])
        return tokenizer.encode(text).ids

    low, high = 0, most
    while low < high:  # the most sentences that fit
        middle = (low + high + 1) // 2
        fits = len(encode(middle)) <= length - DIGITS - 1
        low, high = (middle, high) if fits else (low, middle - 1)
    return encode(low), needles[0]


@torch.inference_mode()
def needle_accuracy(
    model: LlamaForCausalLM, tokenizer: Tokenizer, text: str, length: int, count: int, rng: Random
) -> float:
    """Return the share of needles whose every digit is right, depths spread evenly."""
    sentences = split_sentences(text)
    right = 0
    for i in range(count):
        depth = (i + 0.5) / count
        prompt, needle = make_prompt(tokenizer, sentences, length, depth, rng)
        ids = torch.tensor([prompt])
        out = model.generate(  # type: ignore[misc]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=DIGITS + 2
        )
        right += is_exact(tokenizer.decode(out[0, ids.shape[1] :].tolist()), needle)
    return right / count


def measure_needles(
    model: LlamaForCausalLM, tokenizer: Tokenizer, text: str, count: int, lengths: Sequence[int]
) -> dict[str, float]:
    """Return the share of needles retrieved exactly, by length."""
    found = {}
    for length in lengths:
        accuracy = needle_accuracy(model, tokenizer, text, length, count, Random(length))
        found[str(length)] = round(accuracy, 4)
        print(f"{length} tokens: {accuracy:.1%} of {count} exact", flush=True)
    return found


def measure(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    text: str,
    haystack: str,
    count: int,
    lengths: Sequence[int],
) -> dict[str, object]:
    """Return everything the model card quotes."""
    sample = text[:HELD_OUT_CHARACTERS]
    tokens = len(tokenizer.encode(sample, add_special_tokens=False).ids)
    per_token = perplexity(model, tokenizer, sample, PERPLEXITY_LENGTH)
    print(f"perplexity {per_token:.2f} a token", flush=True)
    return {
        "parameters": model.num_parameters(),
        "held_out_perplexity_per_token": round(per_token, 2),
        "held_out_perplexity_window": PERPLEXITY_LENGTH,
        "held_out_bits_per_byte": round(math.log2(per_token) * tokens / len(sample.encode()), 3),
        "needles_a_document": NEEDLES_A_DOCUMENT,
        "documents_a_length": count,
        "exact_in_held_out_novel": measure_needles(model, tokenizer, text, count, lengths),
        "exact_in_shipped_prose": measure_needles(model, tokenizer, haystack, count, lengths),
    }


def last_record(log: Path) -> dict[str, object]:
    """Return the last line of a run's log: steps, tokens and seconds."""
    record: dict[str, object] = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
    return record


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of the exported model")
    parser.add_argument("--corpus", type=Path, required=True, help="folder of the books")
    parser.add_argument("--haystack", type=Path, required=True, help="the package's haystack.txt")
    parser.add_argument("--log", type=Path, help="the run's log.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--count", type=int, default=64, help="documents a length")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = LlamaForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    text = read_books(arguments.corpus)[HELD_OUT]
    haystack = arguments.haystack.read_text(encoding="utf-8")
    measured = measure(model, tokenizer, text, haystack, arguments.count, arguments.lengths)
    if arguments.log is not None:
        record = last_record(arguments.log)
        measured["run"] = {key: record[key] for key in ("step", "tokens", "seconds")}
    arguments.out.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
