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
    before, copied = keys.clone(), torch.empty_like(keys)
    copy, lead = (partial(copied.copy_, x) for x in (keys, before))
    contenders = [Contender("copy of the bfloat16", copy, 2 * keys.nbytes, lead=lead)]
    for bits in options.bits:
        quantizer = TurboQuantMSE(HEAD_DIM, bits)
        one = Contender(
            f"sixfold {bits:g} bits",
            partial(quantizer.encode, keys),
            keys.nbytes + quantizer.encode(keys).nbytes,
            quantizer.decode,
            lead=partial(quantizer.encode, before),
            notes={"bits": bits},
        )
        contenders += variants("encode", one, options)
        contenders += on_the_reference("encode", one)
    return Case(contenders, keys.double())


def scores_case(tokens: int, options: Options) -> Case:
    """Inner products of four queries a head with every key of the head."""
    keys = _gaussian(1, KV_HEADS, tokens, HEAD_DIM)
    query, before = _gaussian(1, KV_HEADS, GROUP, HEAD_DIM), keys.clone()
    contenders = []
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        call, lead = (partial(_matmul, query.to(dtype), x.to(dtype)) for x in (keys, before))
        nbytes = keys.numel() * dtype.itemsize
        contenders.append(Contender(f"torch matmul {name}", call, nbytes, lead=lead))
    for bits in options.bits:
        quantizer = TurboQuantMSE(HEAD_DIM, bits, scale="unbiased")
        codes, others = quantizer.encode(keys), quantizer.encode(before)
        call, lead = (partial(quantizer.scores, query, x) for x in (codes, others))
        name, notes = f"sixfold {bits:g} bits", {"bits": bits}
        one = Contender(name, call, codes.nbytes, lead=lead, notes=notes)
        contenders += variants("scores", one, options)
    return Case(contenders, _matmul(query.double(), keys.double()))


def _gaussian(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size))).bfloat16()


def _matmul(query: Tensor, keys: Tensor) -> Tensor:
    return query @ keys.mT
