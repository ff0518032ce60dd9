"""What differs between vLLM's platforms."""

from collections.abc import Sequence
from typing import Any

import torch

from sixfold.integrations.vllm.beside import scratch_blocks
from sixfold.integrations.vllm.impl import SixfoldImpl
from sixfold.integrations.vllm.prefill_kernel import Kernel


def kernel(impls: Sequence[SixfoldImpl], vllm_config: Any, device: torch.device) -> Kernel:
    """What attends the prompts of these layers, which have heads of one shape."""
    first, dtype = impls[0], vllm_config.model_config.dtype
    # Each imports what vLLM has on its platform only.
    if device.type == "cpu":
        from sixfold.integrations.vllm.prefill_cpu import CpuKernel

        return CpuKernel(first.num_heads, first.num_kv_heads, first.head_size, dtype)
    from sixfold.integrations.vllm.prefill_cuda import CudaKernel

    return CudaKernel(
        first.num_kv_heads,
        first.head_size,
        dtype,
        device,
        blocks=scratch_blocks(vllm_config),
        sinks=any(impl.sinks is not None for impl in impls),
        softcap=any(impl.softcap is not None for impl in impls),
    )
