"""What `benchmarks.gpu` compares with: full-precision attention, and vLLM's on its own codes."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from sixfold.codebooks import centroids

Call: TypeAlias = Callable[[], Any]


def sdpa_contenders(query: Tensor, keys: Tensor, values: Tensor) -> Iterator[tuple[str, Call]]:
    """Every full-precision kernel that torch offers for these tensors."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def call(backend: Any) -> Tensor:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    backends = {"torch default": None, "flash": SDPBackend.FLASH_ATTENTION}
    backends |= {"cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
    for name, backend in backends.items():
        try:
            call(backend)
        except RuntimeError:
            # Not for these shapes, or not in this build.
            continue
        yield f"sdpa {name} bf16", partial(call, backend)
    if query.is_cuda:
        yield from _flex(query, keys, values)
    grouped = query.view(query.shape[0], keys.shape[1], -1, query.shape[-1])

    def matmul() -> Tensor:
        weights = (grouped @ keys.mT * query.shape[-1] ** -0.5).softmax(-1)
        return torch.matmul(weights, values).view(query.shape)

    yield "matmul bf16", matmul


def _flex(query: Tensor, keys: Tensor, values: Tensor) -> Iterator[tuple[str, Call]]:
    """FlexAttention, whose decoding splits the keys of a group of heads among programs."""
    from torch.nn.attention.flex_attention import flex_attention

    call = partial(
        torch.compile(flex_attention, dynamic=False), query, keys, values, enable_gqa=True
    )
    try:
        call()
    # Compilers raise what they like.
    except Exception:
        return
    yield "flex_attention bf16", call


def vllm_contenders(query: Tensor, keys: Tensor) -> Iterator[tuple[str, Call, int]]:
    """vLLM's decode on its own 4-bit codes, where it can be imported; its bytes, too.

    All codes are zero: its time does not depend on them, and there is no error to state.
    """
    try:
        from vllm.v1.attention.ops.triton_turboquant_decode import (
            triton_turboquant_decode_attention as decode_attention,
        )
    except ImportError:
        return
    (batch, kv_heads, tokens, dim), device, block = keys.shape, keys.device, 16
    key_bytes = dim // 2 + 2
    slot = key_bytes + dim // 2 + 4
    shape = (batch * tokens // block, block, kv_heads, slot)
    cache = torch.zeros(shape, dtype=torch.uint8, device=device)
    blocks = torch.arange(len(cache), dtype=torch.int32, device=device).view(batch, -1)
    lengths = torch.full((batch,), tokens, dtype=torch.int32, device=device)
    rotation = torch.eye(dim, device=device)
    arguments = (query[:, :, 0], cache, blocks, lengths, rotation, centroids(dim, 4, device))
    call = partial(
        decode_attention,
        *arguments,
        dim**-0.5,
        mse_bits=4,
        key_packed_size=key_bytes,
        value_quant_bits=4,
        norm_correction=True,
        PiT=rotation,
    )
    yield "vllm turboquant_4bit_nc", call, cache.nbytes
