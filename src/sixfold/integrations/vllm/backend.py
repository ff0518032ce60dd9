"""What vLLM asks of an attention backend; one class a width."""

import dataclasses
from typing import Any, ClassVar

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout, SlidingWindowSpec

from sixfold.errors import SixfoldError
from sixfold.integrations.vllm.alignment import aligned_nbytes
from sixfold.integrations.vllm.impl import SixfoldImpl
from sixfold.integrations.vllm.metadata import SixfoldMetadataBuilder
from sixfold.integrations.vllm.names import cache_dtype, token_nbytes
from sixfold.integrations.vllm.serving import layer_block, layer_blocks, served
from sixfold.packing import PAGE_TOKENS, Bits

LEAST_CAPABILITY = (8, 0)
SINKS_CAPABILITY = (9, 0)
FLASH_HEAD_SIZES = list(range(8, 257, 8))


class SixfoldBackend(AttentionBackend):
    """Attention on codes in vLLM's blocks.

    Attributes:
        bits: Bits a value.
        name: In vLLM's enumeration.
    """

    bits: ClassVar[Bits]
    name: ClassVar[str]
    impl: ClassVar[type[SixfoldImpl]]
    # Codes are written when a page is full, after it was attended: one operation for vLLM.
    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    def __init_subclass__(cls, *, bits: Bits | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        if bits is None:
            # vLLM derives backends for layers that see a batch cut to pieces, or pooled.
            raise SixfoldError(
                f"Sixfold's backend does not support layers of the kind {cls.__name__} (such as "
                "chunked local attention): serve this model without --attention-backend."
            )
        cls.bits = bits
        cls.name = f"SIXFOLD_{f'{bits:g}'.replace('.', '_')}BIT"
        # vLLM makes layers of this class, and passes them no word of the backend.
        cls.impl = type(f"{cls.__name__}Impl", (SixfoldImpl,), {"bits": bits})

    @classmethod
    def get_name(cls) -> str:
        """See vLLM."""
        return cls.name

    @classmethod
    def get_impl_cls(cls) -> type[SixfoldImpl]:
        """See vLLM."""
        return cls.impl

    @staticmethod
    def get_builder_cls() -> type[SixfoldMetadataBuilder]:
        """See vLLM."""
        return SixfoldMetadataBuilder

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: str | None) -> bool:
        """No dtype, or the one that names this width."""
        return kv_cache_dtype in (None, "auto", cache_dtype(cls.name))

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int]:
        """Pages: vLLM may manage several as one block."""
        return [PAGE_TOKENS]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Pages: the smaller a block, the less of it stays empty."""
        return PAGE_TOKENS

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Those of the kernel that attends prompts."""
        if not current_platform.is_cpu():
            return FLASH_HEAD_SIZES
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        sizes: list[int] = CPUAttentionBackend.get_supported_head_sizes()
        return sizes

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """A head's page in one piece, the heads of a block beside each other."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Yes."""
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        """Logits without a value (GPT-OSS), where the kernel that attends prompts has them."""
        if current_platform.is_cpu():
            return True
        from vllm.v1.attention.backends.fa_utils import flash_attn_supports_sinks

        return bool(flash_attn_supports_sinks())

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        """From 8.0 on (A100): bfloat16 in the tensor cores. On a CPU there is none."""
        return capability is None or tuple(capability) >= LEAST_CAPABILITY

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """No: the open page of a request is in none of the blocks that would be sent."""
        return False

    @classmethod
    def supports_combination(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: str | None,
        block_size: int | None,
        use_mla: bool,
        has_sink: bool,
        use_sparse: bool,
        use_mm_prefix: bool,
        device_capability: Any,
    ) -> str | None:
        """What cannot be served for a reason that vLLM has no word for."""
        if not (current_platform.is_cpu() or current_platform.is_cuda()):
            return "Sixfold's backend runs on vLLM's CPU and CUDA platforms"
        if device_capability is None:
            return None
        if dtype is torch.float32:
            return "FlashAttention, which attends prompts on GPUs, has no float32"
        if has_sink and tuple(device_capability) < SINKS_CAPABILITY:
            return "attention sinks need compute capability 9.0"
        return None

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Blocks of codes: vLLM counts its memory in them."""
        if spec.state_content_bytes is not None:
            return spec
        config = served()
        if config is None:
            content = token_nbytes(cls.bits, spec.head_size, spec.head_size_v)
        else:
            own = layer_block(spec, isinstance(spec, SlidingWindowSpec), config)
            content = aligned_nbytes(cls.bits, own, layer_blocks(SixfoldImpl, config))
        return dataclasses.replace(spec, dtype=torch.uint8, state_content_bytes=content)


class Sixfold8Bit(SixfoldBackend, bits=8):
    """8 bits a value."""


class Sixfold4Bit(SixfoldBackend, bits=4):
    """4 bits a value."""


class Sixfold3_5Bit(SixfoldBackend, bits=3.5):
    """3.5 bits a value."""


class Sixfold3Bit(SixfoldBackend, bits=3):
    """3 bits a value."""


class Sixfold2_5Bit(SixfoldBackend, bits=2.5):
    """2.5 bits a value."""


class Sixfold2Bit(SixfoldBackend, bits=2):
    """2 bits a value."""
