"""The attention of one layer of a model that vLLM runs."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from sixfold.cache.engine import EngineLayer
from sixfold.errors import SixfoldError
from sixfold.integrations.vllm.names import policy
from sixfold.kernels.types import KeyMap, Pool
from sixfold.packing import Bits


class SixfoldImpl(AttentionImpl):
    """Attends and stores: an `EngineLayer` on the blocks that vLLM allots to the layer.

    Attributes:
        bits: Bits a value.
        layer: None until vLLM has made the cache.
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
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.sliding_window, self.softcap = sliding_window, logits_soft_cap or None
        self.kv_cache_dtype, self.sinks = kv_cache_dtype, sinks
        self.kv_sharing_target_layer_name = None
        self.layer: EngineLayer | None = None
        self._blocks: tuple[Tensor, Pool] | None = None

    def open(
        self,
        value_dim: int,
        rows: int,
        sinks: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        key_map: KeyMap | None,
    ) -> None:
        """Make room for what is kept raw: pages, and first tokens of so many sequences."""
        sink_tokens, sink_rows = sinks
        self.layer = EngineLayer(
            policy(self.bits, self.head_size, value_dim, sink_tokens),
            self.num_kv_heads,
            self.head_size,
            value_dim,
            rows,
            dtype=dtype,
            device=device,
            sink_rows=sink_rows,
            sliding_window=self.sliding_window,
            key_map=key_map,
        )

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
        tokens = sum(step.new)
        self.layer.attend(
            query[:tokens],
            key[:tokens],
            value[:tokens],
            self._pool(kv_cache),
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
            self._blocks = kv_cache, self.layer.pool(kv_cache.flatten(2))
        return self._blocks[1]
