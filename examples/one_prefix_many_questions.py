"""Several questions about one text, which is read once and shared, not copied.

    python examples/one_prefix_many_questions.py --file book.txt --model Qwen/Qwen2.5-1.5B-Instruct

Without arguments: the small model and the text inside the package, nothing is downloaded.
"""

import argparse
from pathlib import Path

import torch
from shared import load, read

import sixfold
from sixfold.integrations.transformers import cache_argument

QUESTIONS = ("Who is this about?", "Where does it happen?", "How does it begin?")


def main() -> None:
    """Answer every question from a fork of one cache, and say what the forks share."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded", help="a hub name or a directory")
    parser.add_argument("--file", type=Path, help="a text (UTF-8)")
    asked = parser.parse_args()

    model, tokenizer = load(asked.model)
    document = tokenizer(read(asked.file), return_tensors="pt")["input_ids"]
    shared = sixfold.TurboQuantCache.for_model(model, bits=4)
    with torch.no_grad():
        model.base_model(document, **cache_argument(shared))
    print("read once:", shared)

    for question in QUESTIONS:
        cache = shared.fork()
        ids = tokenizer(f"\n{question}\n", return_tensors="pt", add_special_tokens=False)
        whole = torch.cat([document, ids["input_ids"]], 1)
        answer = model.generate(
            whole,
            attention_mask=torch.ones_like(whole),
            **cache_argument(cache),
            max_new_tokens=30,
            do_sample=False,
        )
        print(question, tokenizer.decode(answer[0, whole.shape[1] :], skip_special_tokens=True))
        print("  tokens in this fork:", cache.get_seq_length())


if __name__ == "__main__":
    main()
