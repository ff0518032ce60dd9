"""Scores by the compiled extension."""

import torch
from jaxtyping import Float16, Float32, UInt8
from torch import Tensor

from sixfold.kernels._groups import address, code_group
from sixfold.kernels._native import compiled
from sixfold.kernels.scores import reference
from sixfold.packing import Bits, n_symbols, row_bytes, symbol_bits

_cpu = compiled()


def scores(
    queries: Float32[Tensor, "*b nq dim"],
    rows: UInt8[Tensor, "*b n row_bytes"],
    scales: Float16[Tensor, "*b n"],
    centroids: Float32[Tensor, " levels *pair"],
    *,
    bits: Bits,
) -> Float32[Tensor, "*b nq n"]:
    """See `sixfold.kernels.scores.scores`."""
    if queries.requires_grad and torch.is_grad_enabled():
        return reference.scores(queries, rows, scales, centroids, bits=bits)
    *batch, n_queries, dim = queries.shape
    n, size = scales.shape[-1], row_bytes(n_symbols(dim, bits), symbol_bits(bits))
    code = code_group(dim, bits, centroids)
    queries, rows, scales = queries.contiguous(), rows.contiguous(), scales.contiguous()
    asked = address("queries", queries, torch.float32, (*batch, n_queries, dim))
    codes = address("rows", rows, torch.uint8, (*batch, n, size))
    stored = address("scales", scales, torch.float16, (*batch, n))
    products = torch.empty(*batch, n_queries, n, dtype=torch.float32, device="cpu")
    _cpu.scores(
        code,
        codes,
        stored,
        scales.shape[:-1].numel(),
        n,
        asked,
        n_queries,
        products.data_ptr(),
        torch.get_num_threads(),
    )
    return products
