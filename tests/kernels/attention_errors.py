"""A kernel's own error on codes, beside the error that the codes are."""

import functools
import math

import torch
from torch import Tensor

from sixfold.codebooks import centroids
from sixfold.kernels import encode, trellis
from sixfold.kernels.rotate import rotate
from sixfold.kernels.types import CodeName, row_symbols
from sixfold.packing import PAGE_TOKENS, Bits, Layout, decode_scale, to_pages
from sixfold.rotation import Rotation
from sixfold.trellis import codewords
from tests.kernels import oracle
from tests.kernels.attention_cases import Case, Side

CPU = torch.device("cpu")


@functools.cache
def encoded(
    tokens: int, dim: int, bits: Bits, layout: Layout, mean: float, code: CodeName
) -> tuple[Tensor, Tensor, Side]:
    """Gaussian vectors, rotated [tokens, dim]; the codewords they became; their pages."""
    generator = torch.Generator().manual_seed(tokens + (layout == "key"))
    x = torch.randn(tokens, dim, generator=generator) + mean
    rotation = Rotation(dim, "hadamard", 3)
    signs, factor = rotation.turns(CPU), rotation.factor(CPU)
    book = codewords(128, bits) if code == "trellis" else centroids(dim, bits)
    encoder = trellis.encode if code == "trellis" else encode.encode
    scale = "unbiased" if layout == "key" else "optimal"
    rows, scales = encoder(x, signs, factor, book, bits=bits, scale=scale)
    chosen = oracle.path_codewords if code == "trellis" else oracle.codewords
    coded = chosen(rows, book, dim, bits) * decode_scale(scales).double()[:, None]
    padding = -tokens % PAGE_TOKENS
    rows = torch.nn.functional.pad(rows, (0, 0, 0, padding), value=7)
    scales = torch.nn.functional.pad(scales, (0, padding), value=math.nan)
    paged = rows.unflatten(0, (-1, 1, PAGE_TOKENS))
    codes = to_pages(paged, *row_symbols(dim, bits, code), layout)
    pages = Side(codes, scales.view(-1, 1, PAGE_TOKENS), book, coded, bits, code)
    return rotate(x, signs, factor).double(), coded, pages


def error_beside_quantization(
    bits: Bits,
    tokens: int,
    sharpness: float,
    *,
    dim: int = 128,
    mean: float = 0.0,
    code: CodeName = "codebook",
) -> float:
    """Distance from float64 on the codes, over the distance that the codes are from the truth.

    Both are means over 64 queries: where a softmax is peaked, either error changes the winner of
    few of them, more rarely the smaller it is.
    """
    keys, coded_keys, key_pages = encoded(tokens, dim, bits, "key", 0.0, code)
    values, coded_values, value_pages = encoded(tokens, dim, bits, "value", mean, code)
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(1, 8, 8, dim, generator=generator) * (sharpness * dim**-0.5)
    pages = len(key_pages.codes)
    lengths = torch.full((pages,), PAGE_TOKENS)
    lengths[-1] -= -tokens % PAGE_TOKENS
    first = torch.zeros(1, 8, dtype=torch.int64)
    table = torch.arange(pages)[None]
    got = Case(query, key_pages, value_pages, table, lengths, first, {}).run().out.double()

    def attend(keys: Tensor, values: Tensor) -> Tensor:
        return (query[0].double() @ keys.mT).softmax(-1) @ values

    on_codes, truth = attend(coded_keys, coded_values), attend(keys, values)
    return ((got[0] - on_codes).norm(dim=-1).sum() / (on_codes - truth).norm(dim=-1).sum()).item()
