"""Ask questions about a long text; what was read is kept in a file for the next run.

    python examples/chat_with_a_document.py --file book.txt --model Qwen/Qwen2.5-1.5B-Instruct

Without arguments: the small model and the text inside the package, nothing is downloaded.
"""

import argparse
import zlib
from pathlib import Path

import torch
from shared import load, read

import sixfold
from sixfold.integrations.transformers import cache_argument


def main() -> None:
    """Read the text once, then answer what is typed, or what `--question` asks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded", help="a hub name or a directory")
    parser.add_argument("--file", type=Path, help="a text (UTF-8)")
    parser.add_argument("--saved", type=Path, help="by default named after the text")
    parser.add_argument("--question", action="append", help="instead of typing; may be repeated")
    asked = parser.parse_args()

    model, tokenizer = load(asked.model)
    text = read(asked.file)
    document = tokenizer(text, return_tensors="pt")["input_ids"]
    # Of another text it would be the wrong one.
    saved = asked.saved or Path(f"document-{zlib.crc32(text.encode()):08x}.sixfold")
    if saved.exists():
        cache = sixfold.TurboQuantCache.load(saved, model)
    else:
        cache = sixfold.TurboQuantCache.for_model(model, bits=4)
        with torch.no_grad():
            model.base_model(document, **cache_argument(cache))
        cache.save(saved)
    print(cache)

    ids = document
    for question in asked.question or iter(lambda: input("> "), ""):
        more = tokenizer(f"\n{question}\n", return_tensors="pt", add_special_tokens=False)
        ids = torch.cat([ids, more["input_ids"]], 1)
        length = ids.shape[1]
        ids = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **cache_argument(cache),
            max_new_tokens=60,
            do_sample=False,
        )
        print(tokenizer.decode(ids[0, length:], skip_special_tokens=True))


if __name__ == "__main__":
    main()
