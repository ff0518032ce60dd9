"""What attends uncompressed tokens on a GPU: FlashAttention, as vLLM ships it."""

from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
from vllm.v1.worker.workspace import current_workspace_manager, is_workspace_manager_initialized

from sixfold.errors import SixfoldError
from sixfold.integrations.vllm.prefill_kernel import Batch
from sixfold.kernels.types import Softmax
from sixfold.packing import PAGE_TOKENS

# Not measured yet: what an attention on codes costs grows with rows of queries, decoding does not.
WORTH_DECODING = 64


class CudaKernel:
    """FlashAttention on blocks of 64. See `sixfold.integrations.vllm.prefill_kernel.Kernel`."""

    worth_decoding = WORTH_DECODING

    def __init__(
        self,
        kv_heads: int,
        dim: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        blocks: int,
        sinks: bool,
        softcap: bool,
    ) -> None:
        """For layers with these heads; most `blocks` are attended in one call.

        Raises:
            SixfoldError: vLLM has no FlashAttention here that does this.
        """
        self.blocks = blocks
        self._memory = scratch(blocks, kv_heads, dim, dtype, device)
        self._version = version(dim, sinks=sinks, softcap=softcap)

    def memory(self, blocks: int) -> tuple[Tensor, Tensor]:
        """See `Kernel`: [blocks, 64, kv_heads, dim]."""
        if blocks > self.blocks:
            raise SixfoldError(
                f"a step needs {blocks} scratch blocks where {self.blocks} were reserved for "
                "--max-model-len"
            )
        return self._memory[0, :blocks], self._memory[1, :blocks]

    def schedule(self, starts: Tensor, lengths: Tensor, window: int | None) -> None:
        """See `Kernel`: each call finds its own."""

    def write(
        self, keys: Tensor, values: Tensor, memory: tuple[Tensor, Tensor], places: Tensor
    ) -> None:
        """See `Kernel`."""
        for target, x in zip(memory, (keys, values), strict=True):
            target.flatten(0, 1).index_copy_(0, places, x)

    def attend(
        self,
        query: Tensor,
        memory: tuple[Tensor, Tensor],
        out: Tensor,
        batch: Batch,
        softmax: Softmax,
    ) -> None:
        """See `Kernel`."""
        self._call(
            query,
            *memory,
            out,
            softmax,
            cu_seqlens_q=batch.starts,
            max_seqlen_q=batch.longest[0],
            seqused_k=batch.lengths,
            max_seqlen_k=batch.longest[1],
            block_table=batch.table,
        )

    def attend_packed(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        out: Tensor,
        starts: Tensor,
        longest: int,
        softmax: Softmax,
    ) -> None:
        """See `AttendPacked`."""
        self._call(
            query,
            keys,
            values,
            out,
            softmax,
            cu_seqlens_q=starts,
            max_seqlen_q=longest,
            cu_seqlens_k=starts,
            max_seqlen_k=longest,
        )

    def _call(
        self, query: Tensor, keys: Tensor, values: Tensor, out: Tensor, softmax: Softmax, **of: Any
    ) -> None:
        # vLLM has it only where there is a GPU.
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

        window = softmax.sliding_window
        flash_attn_varlen_func(
            q=query,
            k=keys,
            v=values,
            out=out,
            softmax_scale=softmax.scaling,
            causal=True,
            # To the left of a token: it sees itself as well.
            window_size=None if window is None else [window - 1, 0],
            softcap=softmax.softcap or 0.0,
            s_aux=softmax.sink_logits,
            fa_version=self._version,
            **of,
        )


def version(dim: int, *, sinks: bool, softcap: bool) -> int:
    """The version of FlashAttention for layers of this kind.

    Raises:
        SixfoldError: vLLM has none here that does this.
    """
    found: int | None = get_flash_attn_version(
        head_size=dim,
        has_sinks=sinks,
        requires_softcap=softcap,
        kv_cache_block_size=PAGE_TOKENS,
    )
    if found is None or (sinks and found == 2):
        what = "with attention sinks (GPT-OSS) " if sinks else ""
        raise SixfoldError(
            f"Sixfold's backend attends prompts with vLLM's FlashAttention, which has no version "
            f"for heads of {dim} {what}on this GPU: serve this model without --attention-backend."
        )
    return found


def scratch(
    blocks: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Memory for keys and values, [2, blocks, 64, kv_heads, dim], one for all layers.

    What no token was written to is read and masked: it must be finite.
    """
    shape = (2, blocks, PAGE_TOKENS, kv_heads, dim)
    if not is_workspace_manager_initialized():
        return torch.zeros(shape, dtype=dtype, device=device)
    found: Tensor = current_workspace_manager().get_persistent(
        ("sixfold", shape, dtype), shape, dtype, zero_init=True
    )
    return found
