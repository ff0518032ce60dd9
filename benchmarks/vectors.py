"""Vectors to codes, and inner products with codes."""

from dataclasses import replace

import torch

from benchmarks.ours import Options, on_the_reference, variants
from sixfold.eval import speed
from sixfold.eval.timing import Case

TOKENS = (4096, 32768)


def encode_case(tokens: int, options: Options) -> Case:
    """Encoding beside copying the same bytes; the error is that of the decoded vectors."""
    made = speed.encode_case(_layers(tokens), options.bits)
    plain = on_the_reference("encode", made)
    found = variants("encode", made, options)
    return replace(found, contenders=[*found.contenders, *plain])


def scores_case(tokens: int, options: Options) -> Case:
    """Inner products of four queries a head with every key of the head."""
    made = speed.scores_case(_layers(tokens), options.bits, dtypes=tuple(speed.DTYPES))
    return variants("scores", made, options)


def _layers(tokens: int) -> speed.Layers:
    return speed.layers(speed.AttentionShape(tokens), torch.device("cpu"), seed=tokens)
