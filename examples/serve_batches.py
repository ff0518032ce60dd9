"""Answer requests in batches. One that is done leaves the batch, and its memory is free again.

    python examples/serve_batches.py --file requests.txt --model Qwen/Qwen2.5-1.5B-Instruct

A request a line. Without arguments: the small model inside the package goes on from a few words.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from shared import load

import sixfold
from sixfold.integrations.transformers import cache_argument

REQUESTS = ["Once upon a time", '"What do you want?" asked', "In the garden", "It is", "One day"]


@torch.no_grad()
def answer(model: Any, tokenizer: Any, requests: list[str], most: int) -> list[str]:
    """Continue these together, each to the end of a sentence or for `most` tokens."""
    inputs = tokenizer(requests, return_tensors="pt", padding=True, padding_side="left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = sixfold.TurboQuantCache.for_model(model, bits=4)
    said: list[list[int]] = [[] for _ in requests]
    rows = torch.arange(len(requests))

    def goes_on(tokens: list[int]) -> bool:
        ended = tokenizer.decode(tokens).rstrip().endswith((".", "!", "?"))
        return not ended and tokens[-1] != tokenizer.eos_token_id and len(tokens) < most

    while len(rows):
        told = {"attention_mask": mask, "position_ids": positions, **cache_argument(cache)}
        ids = model(ids, **told).logits[:, -1:].argmax(-1)
        for row, token in zip(rows, ids[:, 0].tolist(), strict=True):
            said[row].append(token)
        on = torch.tensor([i for i, row in enumerate(rows) if goes_on(said[row])], dtype=torch.long)
        if len(on) < len(rows):
            cache.batch_select_indices(on)
        rows, ids, positions = rows[on], ids[on], positions[on, -1:] + 1
        mask = torch.nn.functional.pad(mask[on], (0, 1), value=1)
    return [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in said]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded", help="a hub name or a directory")
    parser.add_argument("--file", type=Path, help="requests, one a line (UTF-8)")
    parser.add_argument("--batch", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=40, help="of an answer, at most")
    asked = parser.parse_args()
    lines = REQUESTS if asked.file is None else asked.file.read_text("utf-8").splitlines()
    loaded = load(asked.model)
    for start in range(0, len(lines), asked.batch):
        batch = lines[start : start + asked.batch]
        for request, text in zip(batch, answer(*loaded, batch, asked.tokens), strict=True):
            print(f"{request}: {text!r}", flush=True)
