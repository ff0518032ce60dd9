"""What the trellis is worth: ``python -m benchmarks.trellis --out docs/results``.

With ``--speed`` what it takes instead: one thread, every number of states and instruction set.

Squared error of Gaussian vectors beside `TurboQuantMSE` and Shannon's bound; and the mean KL of the
embedded model, plain and hard, whose cache holds the one or the other code in the same bytes.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from transformers.utils import logging

from benchmarks.evaluate import CHUNK, MODELS, NO_WINDOWS
from sixfold import TrellisQuantizer, TurboQuantMSE
from sixfold.eval import machine
from sixfold.eval.caches import compressed
from sixfold.eval.embedded import haystack
from sixfold.eval.perplexity import compare_caches, windows_of
from sixfold.eval.timing import Case, Contender, measure
from sixfold.kernels.types import CodeName
from sixfold.packing import Bits
from sixfold.trellis import PAGE_BITS, STATES, TRELLIS_BITS

SCALAR = "TurboQuantMSE"
CODES = get_args(CodeName)
# Calls of milliseconds: where cores are shared, most end before another program gets this one.
SPEED_DIM, SPEED_VECTORS, SPEED_QUERIES = 128, 2048, 8


def distortion(dim: int, bits: Bits, vectors: int, rotations: int) -> dict[str, Any]:
    """‖x - x̂‖² / ‖x‖² of every quantizer with its optimal scale, over the same vectors."""
    total: dict[str, float] = {}
    for seed in range(rotations):
        x = torch.randn(vectors, dim, generator=torch.Generator().manual_seed(seed))
        x /= x.norm(dim=1, keepdim=True)
        quantizers: dict[str, Any] = {SCALAR: TurboQuantMSE(dim, bits, seed=seed)}
        quantizers |= {str(n): TrellisQuantizer(dim, bits, n, seed=seed) for n in STATES}
        for name, quantizer in quantizers.items():
            lost = (quantizer.decode(quantizer.encode(x)) - x).double().square().sum(1)
            total[name] = total.get(name, 0.0) + float(lost.mean())
    means = {name: one / rotations for name, one in total.items()}
    return {"dim": dim, "bits": bits, "error": means, "bound": 4.0**-bits}


def divergence(
    model_name: str, widths: Sequence[Bits], windows: int, tokens: int
) -> list[dict[str, Any]]:
    """Both codes at every width, without full-precision windows that would hide the difference."""
    subject = MODELS[model_name]
    model, tokenizer = subject.load()
    ids = windows_of(tokenizer, haystack(), tokens, windows)
    caches = {
        # Of the same bits for both: codes are compared, not ways to spend them.
        f"{bits} {name}": compressed(bits, key_bits=bits, value_bits=bits, code=name, **NO_WINDOWS)
        for bits, name in itertools.product(widths, CODES)
    }
    compared = compare_caches(model, ids, caches, prefill=tokens // 2, chunk=CHUNK)
    rows = []
    for bits in widths:
        found = {name: compared[f"{bits} {name}"] for name in CODES}
        difference = found["trellis"].kl_difference(found["codebook"])
        row = {"model": subject.title, "bits": bits, "difference": asdict(difference)}
        rows.append(row | {name: result.to_dict() for name, result in found.items()})
        print(subject.title, bits, *(f"{one.kl.mean:.5f}" for one in found.values()), flush=True)
    return rows


def speed(vectors: int, queries: int, repeats: int) -> list[dict[str, Any]]:
    """Encoding bfloat16, decoding to float32 and scores at dim = 128, and what encoding loses."""
    x = torch.randn(vectors, SPEED_DIM, generator=torch.Generator().manual_seed(0)).bfloat16()
    asked, exact = x[:queries].float(), x.double()
    rows = []
    for isa, states, bits in itertools.product(("avx512", "avx2"), (128, 256), (2, 2.5, 4)):
        quantizer = TrellisQuantizer(SPEED_DIM, bits, states)
        codes = quantizer.encode(x)
        environment = {"SIXFOLD_ISA": isa}
        contenders = [
            Contender(
                "encode",
                partial(quantizer.encode, x),
                2 * x.numel(),
                result=None,
                environment=environment,
            ),
            Contender(
                "decode",
                partial(quantizer.decode, codes),
                4 * x.numel(),
                environment=environment,
            ),
            Contender(
                "scores",
                partial(quantizer.scores, asked, codes),
                codes.nbytes,
                result=None,
                environment=environment,
            ),
        ]
        notes = {"isa": isa, "states": states, "bits": bits}
        measured = measure(Case(contenders, exact), repeats=repeats)
        rows += [row.to_dict() | notes for row in measured]
        print(notes, *(f"{row.gigabytes_per_second:.3f}" for row in measured), flush=True)
    return rows


def write(folder: Path | None, name: str, **document: Any) -> None:
    """Write one file of results, if anywhere."""
    if folder:
        text = json.dumps({"machine": machine.describe(), **document}, indent=2, allow_nan=False)
        (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def main() -> None:
    """Measure; print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dims", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--bits", type=float, nargs="+", default=PAGE_BITS, help="of caches")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--vectors", type=int, default=2048)
    parser.add_argument("--rotations", type=int, default=4)
    parser.add_argument("--windows", type=int, default=8, help="at most")
    parser.add_argument("--tokens", type=int, default=768, help="of a window")
    parser.add_argument("--out", type=Path, help="folder of the JSON files")
    parser.add_argument("--speed", action="store_true", help="measure speed only")
    parser.add_argument("--repeats", type=int, default=61, help="of --speed")
    arguments = parser.parse_args()
    if arguments.speed:
        torch.set_num_threads(1)
        rows = speed(SPEED_VECTORS, SPEED_QUERIES, arguments.repeats)
        sizes = {"dim": SPEED_DIM, "vectors": SPEED_VECTORS, "queries": SPEED_QUERIES}
        write(arguments.out, "trellis_speed", **sizes, rows=rows)
        return
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows = []
    for dim, bits in itertools.product(arguments.dims, TRELLIS_BITS):
        rows.append(distortion(dim, bits, arguments.vectors, arguments.rotations))
        print(dim, bits, rows[-1]["error"], flush=True)
    sizes = {"vectors": arguments.vectors, "rotations": arguments.rotations}
    write(arguments.out, "trellis_distortion", **sizes, rows=rows)
    size = arguments.bits, arguments.windows, arguments.tokens
    rows = [row for name in arguments.models for row in divergence(name, *size)]
    windows = [rows[0][CODES[0]]["windows"], arguments.tokens]
    write(arguments.out, "trellis_kl", windows=windows, chunk=CHUNK, rows=rows)


if __name__ == "__main__":
    main()
