"""What the log says of an engine that serves from codes."""

from collections.abc import Sequence
from typing import Any

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from sixfold.integrations.vllm.impl import SixfoldImpl
from sixfold.integrations.vllm.names import TESTED, Options
from sixfold.packing import PAGE_TOKENS

logger = init_logger("vllm.sixfold")
# Of a GPU's memory.
MUCH = 0.05


def announce(
    impls: Sequence[SixfoldImpl], options: Options, vllm_config: Any, device: torch.device
) -> None:
    """Say what is served, and warn of what is not, or was not tested."""
    _warn_of_version()
    _warn_of_others(vllm_config)
    dtype = vllm_config.model_config.dtype
    impl, layers = impls[0], len(impls)
    layer = impl.layer
    assert layer is not None
    content = layer.block_bytes // PAGE_TOKENS
    raw = sum(x.shape[3] for x in layer.copies) * dtype.itemsize
    pages = 1 + options.recent_window // PAGE_TOKENS
    beside = raw * (pages * PAGE_TOKENS + layer.policy.sink_tokens) * impl.num_kv_heads * layers
    most = sum(x.nbytes for x in (*layer.copies, *layer.sinks)) * layers
    gpu = device.type != "cpu"
    logger.info(
        "Sixfold: %d layers at %g bits (%s), %d bytes a token and KV head (%s: %d), %.2f times the "
        "tokens in the same memory; beside it up to %s KiB of uncompressed tokens a request, %s "
        "%s MiB in all (--max-num-seqs).",
        layers,
        impl.bits,
        " and ".join(sorted({layer.code.keys.code, layer.code.values.code})),
        content,
        str(dtype).removeprefix("torch."),
        raw,
        raw / content,
        f"{beside / 1024:,.0f}",
        "taken at once:" if gpu else "taken as they come and at most",
        f"{most / 2**20:,.0f}",
    )
    if gpu:
        _warn_of_gpu(most, device)


def _warn_of_gpu(most: int, device: torch.device) -> None:
    logger.warning_once(
        "Sixfold's backend has never run on a GPU: its kernels were compiled and interpreted, its "
        "bookkeeping was tested without a device. Compare answers with those of vLLM's own "
        "backend, and please report what you find."
    )
    total = torch.cuda.get_device_properties(device).total_memory
    if most > MUCH * total:
        logger.warning_once(
            "Sixfold: uncompressed tokens beside the blocks take %.0f%% of the GPU's memory. Set "
            "--max-num-seqs to what you mean to run at once.",
            100 * most / total,
        )


def uncompressed(vllm_config: Any) -> list[str]:
    """Names of layers that keep a cache of their own kind: they bring their own attention."""
    layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
    return [
        name
        for name, layer in layers.items()
        if not isinstance(getattr(layer, "impl", None), SixfoldImpl)
        and layer.get_kv_cache_spec(vllm_config) is not None
    ]


def _warn_of_others(vllm_config: Any) -> None:
    others = uncompressed(vllm_config)
    if others:
        logger.warning_once(
            "Sixfold: %d layers bring an attention of their own, and their cache stays as it is: "
            "%s. The log's KV cache size counts them.",
            len(others),
            ", ".join(others[:3]) + (", ..." if len(others) > 3 else ""),
        )


def _warn_of_version() -> None:
    from vllm import __version__

    if not __version__.startswith(TESTED):
        logger.warning_once(
            "Sixfold's backend was tested with vLLM %s; this is %s.", ", ".join(TESTED), __version__
        )
