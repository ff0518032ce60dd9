"""How vLLM comes to know our backends, in each of its processes."""

from typing import Any

from vllm.logger import init_logger
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from sixfold.errors import SixfoldError
from sixfold.integrations.vllm import dtypes
from sixfold.integrations.vllm.hooks import wrap_once
from sixfold.integrations.vllm.names import WIDTHS

logger = init_logger("vllm.sixfold")
BACKENDS = "sixfold.integrations.vllm.backend"

ADVICE = {
    "block_size not supported": "--block-size must be a multiple of 64",
    "kv_cache_dtype not supported": "leave --kv-cache-dtype out",
    "KV connector not supported": "leave --kv-transfer-config and --kv-offloading-size out",
}


def install() -> None:
    """See `sixfold.integrations.vllm.register`."""
    for name in WIDTHS:
        _add(name)
    from vllm.platforms import current_platform

    dtypes.install(type(current_platform))
    if current_platform.is_cpu() or current_platform.is_cuda():
        _honour_selection(type(current_platform))
        _refuse_without_attention(type(current_platform))


def restore(name: str) -> AttentionBackendEnum:
    """A member of vLLM's enumeration, in a process that may not have ours yet."""
    _add(name)
    return AttentionBackendEnum[name]


def _add(name: str) -> None:
    if name in AttentionBackendEnum.__members__:
        return
    register_backend(name, f"{BACKENDS}.{class_name(name)}")
    # Engine processes are spawned, and unpickle their configuration before they load plugins.
    member = AttentionBackendEnum[name]
    member.__reduce_ex__ = lambda protocol: (restore, (name,))


def class_name(name: str) -> str:
    """The class of a backend: ``SIXFOLD_3_5BIT`` is ``Sixfold3_5Bit``."""
    return name.replace("SIXFOLD_", "Sixfold").replace("BIT", "Bit")


def _honour_selection(platform: Any) -> None:
    """vLLM's CPU platform takes its own backend whichever is selected, CUDA's knows no dtypes."""
    wrap_once(platform, "get_attn_backend_cls", _asking_us)


def _asking_us(inner: Any) -> Any:
    def get_attn_backend_cls(
        cls: Any, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        name = _selected(selected_backend, attn_selector_config)
        if name is None:
            path: str = inner(
                cls, *_without_ours(selected_backend, attn_selector_config), num_heads
            )
            return path
        member = AttentionBackendEnum[name]
        reasons = member.get_class().validate_configuration(
            device_capability=cls.get_device_capability(), **attn_selector_config._asdict()
        )
        if reasons:
            raise SixfoldError(
                f"{name} cannot serve this model as configured: {_advised(reasons)}. Leave "
                "--attention-backend out to serve it uncompressed."
            )
        ours: str = member.get_path()
        return ours

    return get_attn_backend_cls


def _advised(reasons: list[str]) -> str:
    """What vLLM says is wrong, and what to do about it."""
    return "; ".join(f"{x} ({ADVICE[x]})" if x in ADVICE else x for x in reasons)


def _refuse_without_attention(platform: Any) -> None:
    """A model without any attention would be served as it is, and nobody would be told."""
    wrap_once(platform, "check_and_update_config", _refusing)


def _refusing(inner: Any) -> Any:
    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        inner(cls, vllm_config)
        chosen = getattr(vllm_config.attention_config.backend, "name", None)
        ours = chosen in WIDTHS or str(vllm_config.cache_config.cache_dtype) in dtypes.BACKENDS
        model = vllm_config.model_config
        if ours and model is not None and model.is_attention_free:
            raise SixfoldError(
                "Sixfold's backend has nothing to compress in a model without attention: leave "
                "--attention-backend out."
            )

    return check_and_update_config


def _without_ours(selected_backend: Any, config: Any) -> tuple[Any, Any]:
    """What vLLM chooses by, for a layer that cannot have what was selected for the others."""
    if getattr(selected_backend, "name", None) in WIDTHS:
        selected_backend = None
    if str(config.kv_cache_dtype) in dtypes.BACKENDS:
        config = config._replace(kv_cache_dtype="auto")
    return selected_backend, config


def _selected(selected_backend: Any, config: Any) -> str | None:
    """The name of ours that a layer is to have; None where vLLM chooses."""
    from vllm.v1.attention.backend import AttentionType

    # Encoders keep nothing; what they ask for is not about a cache.
    if config.attn_type != AttentionType.DECODER:
        return None
    chosen = getattr(selected_backend, "name", None)
    by_dtype = dtypes.BACKENDS.get(str(config.kv_cache_dtype))
    if chosen in WIDTHS and by_dtype not in (None, chosen):
        raise SixfoldError(
            f"--attention-backend {chosen} and --kv-cache-dtype {config.kv_cache_dtype} name "
            "different widths: leave one of them out"
        )
    return chosen if chosen in WIDTHS else by_dtype
