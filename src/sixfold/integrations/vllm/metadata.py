"""What of a batch all layers of a group need, found once a step."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from sixfold.cache.engine import AttendChunks
from sixfold.cache.key_maps import KeyMaps
from sixfold.cache.step import Step
from sixfold.cache.transfer import to_device
from sixfold.errors import SixfoldError
from sixfold.integrations.vllm.announce import announce, uncompressed
from sixfold.integrations.vllm.beside import Beside
from sixfold.integrations.vllm.impl import SixfoldImpl
from sixfold.integrations.vllm.names import Options
from sixfold.integrations.vllm.platforms import kernel
from sixfold.integrations.vllm.prefill import Scratch
from sixfold.integrations.vllm.raw_pages import RawPages, SinkRows
from sixfold.kernels.types import KeyMap
from sixfold.packing import PAGE_TOKENS


@dataclass
class SixfoldMetadata(AttentionMetadata):
    """A step, and what attends its prompts.

    Attributes:
        step: Whose tokens are where.
        chunks: For `EngineLayer.attend`.
    """

    step: Step
    chunks: AttendChunks


class SixfoldMetadataBuilder(AttentionMetadataBuilder):
    """Makes metadata for the layers of one KV cache group, and opens these layers."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        refuse(vllm_config)
        options = Options.read(vllm_config.additional_config)
        maps = None if options.key_map is None else KeyMaps.load(options.key_map)
        beside = Beside.of(vllm_config, options, gpu=device.type != "cpu")
        requests = vllm_config.scheduler_config.max_num_seqs
        self.raw_pages = RawPages(
            requests, recent=beside.full > 0, rows=beside.rows, full=beside.full
        )
        self.sinks = SinkRows(requests, beside.sink_rows) if options.sink_tokens else None
        self.sink_tokens = options.sink_tokens
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        dtype, value_dim = vllm_config.model_config.dtype, kv_cache_spec.head_size_v
        how = {"code": options.code, "refit": not uncompressed(vllm_config)}
        for name, layer in layers.items():
            found = _map_of(maps, name, layer.impl.num_kv_heads, vllm_config)
            layer.impl.open(value_dim, beside, dtype, device, found, **how)
        impls = [layer.impl for layer in layers.values()]
        everyone = get_layers_from_vllm_config(vllm_config, Attention)
        ours = [x.impl for x in everyone.values() if isinstance(x.impl, SixfoldImpl)]
        for impl in impls:
            impl.others = [other for other in ours if other is not impl]
        windows = {impl.sliding_window for impl in impls}
        self.scratch = Scratch(kernel(impls, vllm_config, device), windows=windows)
        # One line for a model, of which each group has a builder.
        if all(one.layer is not None for one in ours) and not ours[0].announced:
            ours[0].announced = True
            announce(ours, options, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> SixfoldMetadata:
        """See vLLM."""
        batch = common_attn_metadata
        starts, lengths = batch.query_start_loc_cpu.tolist(), _lengths(batch)
        running = [i for i in range(batch.num_reqs) if starts[i + 1] > starts[i]]
        new = [starts[i + 1] - starts[i] for i in running]
        ends = [lengths[i] for i in running]
        context = [end - count for end, count in zip(ends, new, strict=True)]
        table = batch.block_table_tensor[:, : max(-(-end // PAGE_TOKENS) for end in ends)]
        table = table[to_device(np.array(running), table.device)]
        host = zip(host_table(table), ends, strict=True)
        blocks = [own[: -(-end // PAGE_TOKENS)] for own, end in host]
        rows = torch.from_numpy(self.raw_pages.step(context, ends, blocks))
        sinks = None
        if self.sinks is not None:
            sinks = torch.from_numpy(self.sinks.step(context, [own[0] for own in blocks]))
        step = Step(new, context, table, rows, sinks, self.sink_tokens)
        return SixfoldMetadata(step, self.scratch.plan(step, blocks))


def _lengths(batch: CommonAttentionMetadata) -> list[int]:
    """Tokens of each request after the step: exact, as nothing is speculated."""
    known = batch.seq_lens_cpu_upper_bound
    found: list[int] = (batch.seq_lens if known is None else known).tolist()
    return found


def host_table(table: torch.Tensor) -> list[list[int]]:
    """The block table on the host, whose own copy vLLM does not hand on.

    The host waits for a GPU here, once a step and group of layers, and where pages are filled
    before key maps are fitted to enough of them.
    """
    found: list[list[int]] = table.cpu().tolist()
    return found


def refuse(vllm_config: Any) -> None:
    """Refuse what a backend is not asked about, before the first request.

    Raises:
        SixfoldError: Something is configured that cannot work yet.
    """
    parallel = vllm_config.parallel_config
    wrong = {
        "speculative decoding (--speculative-config)": vllm_config.speculative_config is not None,
        "decode context parallelism (--decode-context-parallel-size)": (
            parallel.decode_context_parallel_size > 1
        ),
        "prefill context parallelism": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "offloading or transfer of the KV cache (--kv-transfer-config, --kv-offloading-size)": (
            vllm_config.kv_transfer_config is not None
        ),
        "overlapping two batches (--enable-dbo, --ubatch-size)": getattr(
            parallel, "use_ubatching", False
        ),
        "models with Mamba layers": vllm_config.model_config.is_hybrid,
        "leaving layers uncompressed (--kv-cache-dtype-skip-layers)": bool(
            getattr(vllm_config.cache_config, "kv_cache_dtype_skip_layers", None)
        ),
    }
    for name, found in wrong.items():
        if found:
            raise SixfoldError(
                f"Sixfold's backend does not support {name}: leave it out, or serve uncompressed "
                "without --attention-backend."
            )


def _map_of(maps: KeyMaps | None, name: str, kv_heads: int, vllm_config: Any) -> KeyMap | None:
    """The map of a layer, of the heads that this process has of it."""
    if maps is None:
        return None
    index, layers = (
        extract_layer_index(name),
        vllm_config.model_config.get_total_num_hidden_layers(),
    )
    if index not in maps.layers or max(maps.layers) >= layers:
        raise SixfoldError(
            f"key_map: expected maps of {layers} layers, {index} ({name}) among them, got those of "
            f"{sorted(maps.layers)}: the file was made for another model."
        )
    mean, scale, _ = maps[index]
    heads, size = mean.shape[1], vllm_config.parallel_config.tensor_parallel_size
    if size == 1 and heads == kv_heads:
        return maps[index]
    if size > 1 and max(1, heads // size) == kv_heads:
        from vllm.distributed import get_tensor_model_parallel_rank

        # Where there are more processes than heads, neighbours have the same.
        start = get_tensor_model_parallel_rank() * heads // size
        own = slice(start, start + kv_heads)
        return KeyMap(mean[:, own].contiguous(), scale[:, own].contiguous())
    raise SixfoldError(
        f"key_map: layer {index} has {heads} KV heads, {name} has {kv_heads} in each of {size} "
        "processes: the file was made for another model."
    )
