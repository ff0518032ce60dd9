"""The attention of one layer of a model that vLLM runs."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from sixfold.cache.engine import EngineLayer
from sixfold.cache.step import Step
from sixfold.errors import SixfoldError
from sixfold.integrations.vllm.beside import Beside, scratch_blocks
from sixfold.integrations.vllm.names import CODE, Options, policy
from sixfold.integrations.vllm.serving import remember
from sixfold.integrations.vllm.sharing import overlap
from sixfold.kernels.types import CodeName, KeyMap, Pool
from sixfold.packing import Bits


class SixfoldImpl(AttentionImpl):
    """Attends and stores: an `EngineLayer` on the blocks that vLLM allots to the layer.

    Attributes:
        bits: Bits a value.
        layer: None until vLLM has made the cache.
        others: The other layers of the model.
        announced: Whether the log has said what they serve.
    """

    bits: ClassVar[Bits]

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        for name, given in (
            ("ALiBi", alibi_slopes is not None),
            ("layers that share the cache of another", kv_sharing_target_layer_name is not None),
            (f"attention of type {attn_type}", attn_type != AttentionType.DECODER),
        ):
            if given:
                raise SixfoldError(
                    f"Sixfold's backend does not support {name}: serve this model uncompressed, "
                    "without --attention-backend."
                )
        remember()
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.sliding_window, self.softcap = sliding_window, logits_soft_cap or None
        self.kv_cache_dtype, self.sinks = kv_cache_dtype, sinks
        self.kv_sharing_target_layer_name = None
        self.layer: EngineLayer | None = None
        self.others: Sequence[SixfoldImpl] = ()
        self.announced = False
        self._blocks: tuple[Tensor, Pool] | None = None
        self._sharing: list[SixfoldImpl] = []
        device = torch.get_default_device()
        if device.type == "cuda":
            # What is taken while vLLM loads the model it leaves out of the memory for blocks.
            reserve(self, get_current_vllm_config(), device)

    def open(
        self,
        value_dim: int,
        beside: Beside,
        dtype: torch.dtype,
        device: torch.device,
        key_map: KeyMap | None,
        *,
        code: CodeName = CODE,
        refit: bool = True,
    ) -> None:
        """Begin without any sequence, in the memory of before where there is some."""
        held = self.layer
        if held is not None and value_dim != held.copies[1].shape[3]:
            raise SixfoldError(
                f"Sixfold's backend does not support values of {value_dim} coordinates beside keys "
                f"of {self.head_size} on GPUs: serve this model without --attention-backend."
            )
        self.layer = EngineLayer(
            policy(self.bits, self.head_size, value_dim, beside.sink_tokens, code),
            self.num_kv_heads,
            self.head_size,
            value_dim,
            beside.rows if held is None else 0,
            dtype=dtype,
            device=device,
            sink_rows=beside.sink_rows if held is None else 0,
            sliding_window=self.sliding_window,
            key_map=key_map,
            refit=refit,
        )
        if held is not None:
            self.layer.copies, self.layer.sinks = held.copies, held.sinks

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """See vLLM: query [tokens, heads, dim], keys and values [tokens, kv_heads, dim].

        Raises:
            SixfoldError: A quantized output is asked for.
        """
        if output_scale is not None or output_block_scale is not None:
            raise SixfoldError("Sixfold's backend does not quantize its output.")
        if attn_metadata is None:
            # Warming up: there is no cache yet.
            return output.fill_(0)
        assert self.layer is not None, "vLLM runs a layer before it made a cache for it"
        step = attn_metadata.step
        tokens, pool = sum(step.new), self._pool(kv_cache)
        self._claim(step)
        self.layer.attend(
            query[:tokens],
            key[:tokens],
            value[:tokens],
            pool,
            step,
            scaling=self.scale,
            softcap=self.softcap,
            sink_logits=self.sinks,
            chunks=attn_metadata.chunks,
            out=output[:tokens],
        )
        return output

    def _pool(self, kv_cache: Tensor) -> Pool:
        """vLLM's blocks [blocks, kv_heads, 64, bytes]: a head's page is one piece of a block."""
        assert self.layer is not None
        if self._blocks is None or self._blocks[0] is not kv_cache:
            # Behind its codes and scales a page may have a few bytes that align it.
            pages = kv_cache.flatten(2)[..., : self.layer.block_bytes]
            self._blocks = kv_cache, self.layer.pool(pages)
            self._meet(kv_cache)
        return self._blocks[1]

    def _meet(self, kv_cache: Tensor) -> None:
        """Find the layers that have the same memory, of those that have any yet."""
        self._sharing = []
        for other in self.others:
            if other._blocks is None or other.layer is None:
                continue
            found = overlap(kv_cache, other._blocks[0])
            if found == "same":
                self._sharing.append(other)
                other._sharing.append(self)
            elif found == "mixed":
                # Nobody could tell them which of their blocks this layer has written to.
                for one in (self, other):
                    assert one.layer is not None
                    one.layer.settle()

    def _claim(self, step: Step) -> None:
        """Tell the layers that have the same memory what this one writes in it."""
        if not len(step.fill.beginning):
            return
        for other in self._sharing:
            if other.layer is not None and other.layer.learning:
                other.layer.forget(step.fill.blocks)


def reserve(impl: SixfoldImpl, vllm_config: Any, device: torch.device) -> None:
    """Take all memory that a layer on a GPU needs beside its blocks."""
    from sixfold.integrations.vllm.prefill_cuda import scratch

    dtype = vllm_config.model_config.dtype
    options = Options.read(vllm_config.additional_config)
    beside = Beside.of(vllm_config, options, gpu=True)
    # Tables of codes are made on the host, whatever the device of the model that is loaded.
    with torch.device("cpu"):
        impl.open(impl.head_size, beside, dtype, device, None, code=options.code)
    scratch(scratch_blocks(vllm_config), impl.num_kv_heads, impl.head_size, dtype, device)
