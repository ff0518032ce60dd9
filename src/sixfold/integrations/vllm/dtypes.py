"""``--kv-cache-dtype sixfold_4bit``: vLLM 0.33 takes names that a plugin brings, 0.32 does not."""

import argparse
import sys
from typing import Any

import torch

from sixfold.errors import SixfoldError
from sixfold.integrations.vllm.hooks import wrap_once
from sixfold.integrations.vllm.names import WIDTHS, cache_dtype

BACKENDS = {cache_dtype(name): name for name in WIDTHS}


def install(platform: Any) -> None:
    """Make the dtypes known, or what to type in their place.

    Args:
        platform: vLLM's class of it.
    """
    from vllm.config import cache

    if hasattr(cache, "register_kv_cache_dtype"):
        for dtype in BACKENDS:
            # vLLM warns of names that are registered again.
            if not cache.is_known_kv_cache_dtype(dtype):
                _register(dtype)
        return
    _explain_to_command_line(platform)
    _explain_to_python()


def _register(dtype: str) -> None:
    from vllm.config.cache import register_kv_cache_dtype
    from vllm.v1.kv_cache_interface import KVQuantMode

    class Handler:
        name = dtype

        def torch_dtype(self) -> torch.dtype:
            return torch.uint8

        def quant_mode(self) -> Any:
            return KVQuantMode.CUSTOM

    register_kv_cache_dtype(dtype)(Handler)


def _advice(dtype: str) -> str:
    from vllm import __version__

    return (
        f"vLLM {__version__} takes no --kv-cache-dtype from a plugin (0.33 and later do): type "
        f"--attention-backend {BACKENDS[dtype]} in place of --kv-cache-dtype {dtype}"
    )


def _explain_to_command_line(platform: Any) -> None:
    """The argument is refused before any of our code is asked, but for this hook of platforms."""
    wrap_once(platform, "pre_register_and_update", _reading)


def _reading(inner: Any) -> Any:
    def read(dtype: str) -> str:
        if dtype in BACKENDS:
            raise argparse.ArgumentTypeError(_advice(dtype))
        return dtype

    def pre_register_and_update(cls: Any, parser: Any = None) -> None:
        inner(cls, parser)
        for action in () if parser is None else parser._actions:
            if "--kv-cache-dtype" in action.option_strings:
                action.type = read

    return pre_register_and_update


def _explain_to_python() -> None:
    """In a process that was given arguments: the others read a configuration that was checked."""
    arguments = sys.modules.get("vllm.engine.arg_utils")
    if hasattr(arguments, "resolve_kv_cache_dtype_string"):
        wrap_once(arguments, "resolve_kv_cache_dtype_string", _resolving)


def _resolving(inner: Any) -> Any:
    def resolve_kv_cache_dtype_string(dtype: str, model_config: Any) -> str:
        if dtype in BACKENDS:
            raise SixfoldError(_advice(dtype))
        resolved: str = inner(dtype, model_config)
        return resolved

    return resolve_kv_cache_dtype_string
