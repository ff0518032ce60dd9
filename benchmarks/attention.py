"""A layer's decode attention: one query a head over the whole context."""

from dataclasses import replace

import torch

from benchmarks import vllm_peer
from benchmarks.ours import Options, variants
from sixfold.eval import speed
from sixfold.eval.timing import Case
from sixfold.packing import PAGE_TOKENS

TOKENS = (1024, 4096, 32768, 131072)


def case(tokens: int, options: Options) -> Case:
    """Ours against attention of PyTorch, and of vLLM where there is one, on the same bfloat16."""
    layers = speed.layers(speed.AttentionShape(tokens), torch.device("cpu"), seed=tokens)
    made = speed.attention_case(
        layers, options.bits, dtypes=tuple(speed.DTYPES), codes=options.codes
    )
    found = variants("attention", made, options)
    contenders = list(found.contenders)
    if options.bits:
        grown = speed.attention_on_codes(layers, options.bits[0], PAGE_TOKENS)
        contenders.append(replace(grown, name=f"{grown.name}, grown page by page"))
    if options.vllm_python is not None:
        one = layers[0]
        contenders += vllm_peer.contenders(options.vllm_python, one.query, one.keys, one.values)
    return replace(found, contenders=contenders)
