"""What attends uncompressed tokens on a CPU: vLLM's own kernel."""

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from sixfold.integrations.vllm.prefill_kernel import Batch
from sixfold.kernels.types import Softmax
from sixfold.packing import PAGE_TOKENS

# From so many new tokens on it is faster to decode the context once and attend it uncompressed than
# to attend the codes (docs/vllm.md). What vLLM's kernel runs on decides.
WORTH_DECODING = {"amx": 64}
OTHERWISE = 256


class CpuKernel:
    """vLLM's attention on CPUs. See `sixfold.integrations.vllm.prefill_kernel.Kernel`."""

    # vLLM's kernel reads blocks only.
    attend_packed = None

    def __init__(self, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
        self.heads, self.kv_heads, self.dim, self.dtype = heads, kv_heads, dim, dtype
        self.isa = _get_attn_isa(dtype, PAGE_TOKENS, dim)
        self.worth_decoding = WORTH_DECODING.get(self.isa, OTHERWISE)
        self._memory = torch.zeros(0, kv_heads, 2 * PAGE_TOKENS, dim, dtype=dtype, device="cpu")

    def memory(self, blocks: int) -> tuple[Tensor, Tensor]:
        """See `Kernel`: [blocks, kv_heads, 64, dim]."""
        if len(self._memory) < blocks:
            # What no token was written to is read and masked: it must be finite.
            self._memory = self._memory.new_zeros(blocks, *self._memory.shape[1:])
        keys, values = self._memory[:blocks].chunk(2, 2)
        return keys, values

    def schedule(self, starts: Tensor, lengths: Tensor, window: int | None) -> Tensor:
        """See `Kernel`."""
        found: Tensor = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(lengths),
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.dim,
            seq_lens=lengths,
            dtype=self.dtype,
            query_start_loc=starts,
            causal=True,
            sliding_window_size=-1 if window is None else window,
            isa=self.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        )
        return found

    def write(
        self, keys: Tensor, values: Tensor, memory: tuple[Tensor, Tensor], places: Tensor
    ) -> None:
        """See `Kernel`."""
        ops.cpu_attn_reshape_and_cache(keys, values, *memory, places, self.isa)

    def attend(
        self,
        query: Tensor,
        memory: tuple[Tensor, Tensor],
        out: Tensor,
        batch: Batch,
        softmax: Softmax,
    ) -> None:
        """See `Kernel`."""
        sinks, window = softmax.sink_logits, softmax.sliding_window
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=memory[0],
            value_cache=memory[1],
            output=out,
            query_start_loc=batch.starts,
            seq_lens=batch.lengths,
            scale=softmax.scaling,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1 if window is None else window,
            block_table=batch.table,
            softcap=softmax.softcap or 0.0,
            scheduler_metadata=batch.schedule,
            s_aux=sinks if sinks is None or sinks.dtype is torch.bfloat16 else sinks.float(),
        )
