"""Whether the compiled kernels do what the references do, before anything is timed."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from benchmarks.gpu_cases import (
    Code,
    Shape,
    attend,
    codings,
    compressed,
    empty_pages,
    exact_attention,
    random,
    tables,
)
from sixfold.eval.timing import relative_error
from sixfold.kernels import _dispatch
from sixfold.kernels.decode import decode
from sixfold.kernels.decode import reference as decode_reference
from sixfold.kernels.encode import encode, store_pages
from sixfold.kernels.encode import reference as encode_reference
from sixfold.kernels.types import Pool
from sixfold.packing import PAGE_TOKENS, Bits

CPU = torch.device("cpu")


def use_interpreter() -> None:
    """On a CPU: operations that have a Triton backend run it, in Triton's interpreter."""
    # The environment's override would refuse operations that have none.
    _dispatch._FASTEST["cpu"] = "triton"


Check: TypeAlias = Callable[[], dict[str, Any]]


def checks(device: torch.device, codes: Sequence[Code], quick: bool) -> Iterator[tuple[str, Check]]:
    """Codes and vectors bit for bit against the CPU's reference; attention against float64.

    Every width at one dimension, every class of dimension at one width: each compiles anew.
    """
    count, shape = (20, Shape(4, 2, 64)) if quick else (2000, Shape())
    dims = (80,) if quick else (64, 80, 256, 33)
    for code in codes:
        name = f"attention, dim {shape.dim}, {code}"
        yield name, partial(_attention, code, shape, 128 if quick else 4096, device)
    bits = [code.bits for code in codes if code.name == "codebook"]
    for dim, width in [*((shape.dim, width) for width in bits), *((dim, 4) for dim in dims)]:
        name = f"codes, dim {dim}, {width:g} bits"
        yield name, partial(_codes, dim, width, device, count)
    for code in codes:
        if code.name == "trellis":
            name = f"pages, dim {shape.dim}, {code}"
            yield name, partial(_pages, code, shape.dim, device, 1 if quick else 16)


def _codes(dim: int, bits: Bits, device: torch.device, count: int) -> dict[str, Any]:
    x = random(count, dim, device=device, seed=dim)
    x[0] = 0
    x[1, 0] = torch.nan
    rows, scales = encode(x, *tables(dim, bits, device), bits=bits, scale="unbiased")
    arrays = tables(dim, bits, CPU)
    expected = encode_reference.encode(x.cpu(), *arrays, bits=bits, scale="unbiased")
    vectors = decode(rows, scales, *tables(dim, bits, device), dim=dim, bits=bits).cpu()
    decoded = decode_reference.decode(*expected, *arrays, dim=dim, bits=bits)
    differing = int((rows.cpu() != expected[0]).any(-1).sum())
    same_scales = _same(scales.cpu().view(torch.int16), expected[1].view(torch.int16))
    # A dense rotation's sums are in float64, in an order of their own.
    same_vectors = bool(torch.allclose(vectors, decoded, 1e-6, 1e-9, equal_nan=True))
    exact = len(arrays[0]) > 0 and _same(vectors.nan_to_num(), decoded.nan_to_num())
    return {
        "vectors": count,
        "differing_codes": differing,
        "bit_identical": differing == 0 and same_scales and exact,
        "passed": same_vectors
        and ((differing == 0 and same_scales and exact) or (len(arrays[0]) == 0 and differing < 2)),
    }


def _pages(code: Code, dim: int, device: torch.device, count: int) -> dict[str, Any]:
    """Pages of keys and values as the CPU's reference writes them."""
    keys, values = (random(1, 1, count * PAGE_TOKENS, dim, device=device, seed=n) for n in (3, 4))
    keys[0, 0, 0], values[0, 0, 1, 0] = 0, torch.nan
    slots = torch.arange(count, device=device)[None]
    how = codings(dim, code, device)
    got = Pool(*(x for side in how for x in empty_pages(count, 1, side, device)))
    store_pages(keys, values, slots, got, *how)
    how = codings(dim, code, CPU)
    expected = Pool(*(x for side in how for x in empty_pages(count, 1, side, CPU)))
    encode_reference.store_pages(keys.cpu(), values.cpu(), slots.cpu(), expected, *how)
    same = [
        _same(ours.cpu().view(torch.uint8), theirs.view(torch.uint8))
        for ours, theirs in zip(got, expected, strict=True)
    ]
    return {"vectors": 2 * count * PAGE_TOKENS, "bit_identical": all(same), "passed": all(same)}


def _same(got: Tensor, expected: Tensor) -> bool:
    return bool(torch.equal(got, expected))


def _attention(code: Code, shape: Shape, tokens: int, device: torch.device) -> dict[str, Any]:
    """The error of attention on codes, beside that of exact attention on the decoded codes."""
    from sixfold.kernels.decode import decode_pages

    size = (2, shape.kv_heads, tokens, shape.dim)
    keys, values = (random(*size, device=device, seed=seed) for seed in (7, 8))
    query = random(2, shape.heads, 1, shape.dim, device=device, seed=9).float()
    paged = compressed(keys, values, code, shape)
    (pool, slots, *_), how = paged.pages, codings(shape.dim, code, device)
    dense = [
        decode_pages(*pool[:2], slots, how[0], "key", torch.float32),
        decode_pages(*pool[2:], slots, how[1], "value", torch.float32),
    ]
    on_codes = exact_attention(query, *dense)
    got = attend(query, paged, code)
    error = relative_error(got, on_codes)
    return {
        "error_against_decoded_in_float64": error,
        "error_against_originals": relative_error(got, exact_attention(query, keys, values)),
        # Operands of float16, products added up in float32.
        "passed": error < 2**-9,
    }
