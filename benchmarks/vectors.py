"""Vectors to codes, and inner products with codes."""

from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Case, Contender
from benchmarks.ours import Options, on_the_reference, variants
from sixfold.quantizers import TurboQuantMSE

KV_HEADS, GROUP, HEAD_DIM = 8, 4, 128
TOKENS = (4096, 32768)


def encode_case(tokens: int, options: Options) -> Case:
    """Encoding beside copying the same bytes; the error is that of the decoded vectors."""
    keys = _gaussian(1, KV_HEADS, tokens, HEAD_DIM)
    copied = torch.empty_like(keys)
    contenders = [Contender("copy of the bfloat16", partial(copied.copy_, keys), 2 * keys.nbytes)]
    for bits in options.bits:
        quantizer = TurboQuantMSE(HEAD_DIM, bits)
        one = Contender(
            f"sixfold {bits:g} bits",
            partial(quantizer.encode, keys),
            keys.nbytes + quantizer.encode(keys).nbytes,
            quantizer.decode,
            notes={"bits": bits},
        )
        contenders += variants("encode", one, options)
        contenders += on_the_reference("encode", one)
    return Case(contenders, keys.double())


def scores_case(tokens: int, options: Options) -> Case:
    """Inner products of four queries a head with every key of the head."""
    keys = _gaussian(1, KV_HEADS, tokens, HEAD_DIM)
    query = _gaussian(1, KV_HEADS, GROUP, HEAD_DIM)
    contenders = [
        Contender("torch matmul bf16", partial(_matmul, query, keys), keys.nbytes),
        Contender(
            "torch matmul fp32", partial(_matmul, query.float(), keys.float()), keys.nbytes * 2
        ),
    ]
    for bits in options.bits:
        quantizer = TurboQuantMSE(HEAD_DIM, bits, scale="unbiased")
        codes = quantizer.encode(keys)
        call = partial(quantizer.scores, query, codes)
        one = Contender(f"sixfold {bits:g} bits", call, codes.nbytes, notes={"bits": bits})
        contenders += variants("scores", one, options)
    return Case(contenders, _matmul(query.double(), keys.double()))


def _gaussian(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size))).bfloat16()


def _matmul(query: Tensor, keys: Tensor) -> Tensor:
    return query @ keys.mT
