"""What the log says of an engine that serves from codes."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from sixfold.integrations.vllm.alignment import aligned_nbytes
from sixfold.integrations.vllm.impl import SixfoldImpl
from sixfold.integrations.vllm.names import TESTED, Options
from sixfold.integrations.vllm.serving import layer_blocks
from sixfold.packing import PAGE_TOKENS

logger = init_logger("vllm.sixfold")
# Of a GPU's memory.
MUCH = 0.05


def announce(
    impls: Sequence[SixfoldImpl], options: Options, vllm_config: Any, device: torch.device
) -> None:
    """Say what the layers of a model serve; warn of what is not served, or was not tested."""
    _warn_of_version()
    _warn_of_others(vllm_config)
    dtype, bits = vllm_config.model_config.dtype, impls[0].bits
    blocks = layer_blocks(SixfoldImpl, vllm_config)
    heads = [one.kv_heads for one in blocks]
    contents = [aligned_nbytes(bits, one, blocks) for one in blocks]
    raws = [(one.key_dim + one.value_dim) * dtype.itemsize for one in blocks]
    held, plain = (sum(map(operator.mul, heads, each)) for each in (contents, raws))
    tokens = (1 + options.recent_window // PAGE_TOKENS) * PAGE_TOKENS + options.sink_tokens
    layers = [one.layer for one in impls if one.layer is not None]
    most = sum(x.nbytes for one in layers for x in (*one.copies, *one.sinks))
    gpu = device.type != "cpu"
    logger.info(
        "Sixfold: %d layers at %g bits (%s), %s bytes a token and KV head (%s: %s), %.2f times the "
        "tokens in the same memory; beside it up to %s KiB of uncompressed tokens a request, %s "
        "%s MiB in all (--max-num-seqs).",
        len(impls),
        bits,
        " and ".join(
            sorted({side.code for one in layers for side in (one.code.keys, one.code.values)})
        ),
        _from_to(contents),
        str(dtype).removeprefix("torch."),
        _from_to(raws),
        plain / held,
        f"{plain * tokens / 1024:,.0f}",
        "taken at once:" if gpu else "taken as they come and at most",
        f"{most / 2**20:,.0f}",
    )
    if gpu:
        _warn_of_gpu(most, device)


def _from_to(numbers: Sequence[int]) -> str:
    least, most = min(numbers), max(numbers)
    return f"{least}" if least == most else f"{least} to {most}"


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
