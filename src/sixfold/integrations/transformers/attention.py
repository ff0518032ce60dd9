"""The attention and mask functions that transformers calls under the name `sixfold`."""

import contextlib
import warnings
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sixfold.cache import CompressedLayer, StaticLayer
from sixfold.cache.gradients import refuse_gradient
from sixfold.errors import UnsupportedModelError
from sixfold.integrations.transformers.watch import meet
from sixfold.kernels.attention import exact_attention

_recorder: Any = None
with contextlib.suppress(ImportError):
    from transformers.utils.output_capturing import _active_collector as _recorder

NAME = "sixfold"
NO_WEIGHTS = (
    "attention on codes computes no attention weights: `output_attentions=True` gives none. For "
    'weights use TurboQuantCache(model.config, ...) and model.set_attn_implementation("eager").'
)

NO_GRADIENT = "a static cache computes no gradients: decode in it under torch.no_grad()."

# What torch.compile says where it was told to allow no graph break.
GROWS = (
    "a TurboQuantCache that grows cannot be traced: compile without fullgraph=True, or decode in "
    "cache.static(max_tokens)"
)


def untraced_growth(function: Any) -> Any:
    """`function`, which torch.compile leaves to Python; `GROWS` says why where it may not."""
    try:
        return torch.compiler.disable(function, reason=GROWS)
    except TypeError:
        # torch 2.6 takes no reason.
        return torch.compiler.disable(function)


class CodesHandle:
    """Stands for keys and values of a layer between `Cache.update` and the attention function.

    Model code may pass it on but not compute with it: there is no dense tensor to compute with.
    A model that tries has not attended the new tokens: the layer forgets them, so that nothing is
    lost once the model is as it should be.

    Attributes:
        store: The layer, which holds the new tokens already.
        new: How many they are; None once they have been attended or taken back.
    """

    __slots__ = ("new", "store")

    def __init__(self, store: CompressedLayer, new: int) -> None:
        self.store = store
        self.new: int | None = new

    def attend(self, query: Tensor, **options: Any) -> Tensor:
        """Attention over all that the layer holds.

        Raises:
            UnsupportedModelError: Called again: the first call may have turned tokens into codes.
        """
        if self.new is None:
            raise UnsupportedModelError(_misuse("attends twice to"))
        self.new = None
        return self.store.attend(query, **options)

    def __getattr__(self, name: str) -> NoReturn:
        # What Python and its tools look for of their own accord is not there.
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        raise self._refused(f"reads `.{name}` of")

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> NoReturn:
        action = f"calls {getattr(func, '__name__', func)} on"
        given = (*args, *(kwargs or {}).values())
        handle = next((x for x in given if isinstance(x, cls)), None)
        raise UnsupportedModelError(_misuse(action)) if handle is None else handle._refused(action)

    def take_back(self) -> None:
        """Let the layer forget the new tokens, if they have not been attended."""
        if self.new is not None:
            self.store.take_back(self.new)
            self.new = None

    def _refused(self, action: str) -> UnsupportedModelError:
        self.take_back()
        return UnsupportedModelError(_misuse(action))


class StaticHandle:
    """A `CodesHandle` of a static layer: one that torch.compile can trace, without the guards."""

    def __init__(self, layer: StaticLayer, detached: bool) -> None:
        self.layer, self.detached = layer, detached

    def attend(self, query: Tensor, **options: Any) -> Tensor:
        """Attention over all that the layer holds."""
        out = self.layer.attend(query, **options)
        if torch.is_grad_enabled() and (self.detached or query.requires_grad):
            return refuse_gradient(out, NO_GRADIENT)
        return out


def mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' mask for `sdpa`, which leaves it out where plain causality does."""
    if _weights_recorded():
        _warn_of_weights()
    shared = getattr(kwargs.get("config"), "num_kv_shared_layers", None)
    if shared and kwargs.get("q_length") != kwargs.get("kv_length"):
        # See `_shared_tail`: in memory of fixed size nobody could tell which queries are left.
        kwargs["allow_is_causal_skip"] = False
    return sdpa_mask(*args, **kwargs)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | CodesHandle | StaticHandle,
    value: Tensor | CodesHandle | StaticHandle,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention on codes where `key` stands for a compressed layer, exact attention elsewhere.

    Args:
        module: The model's attention module.
        query: [batch, heads, queries, head_dim].
        key: What `Cache.update` returned, or dense keys of a layer that is not compressed.
        value: Likewise.
        attention_mask: Boolean or additive mask over the tokens held, None if plainly causal.
        dropout: Ignored on codes: a cache is for inference.
        scaling: Factor of the logits, 1/√head_dim by default.
        sliding_window: Ignored: the cache layer and the mask know it.
        softcap: Soft-capping of the logits (Gemma 2).
        s_aux: Sink logit a head (GPT-OSS).
        kwargs: Passed on to transformers' own attention for dense layers.

    Returns:
        [batch, queries, heads, value_dim], and None for the attention weights.
    """
    options: dict[str, Any] = {"softcap": softcap, "sink_logits": s_aux, "mask": attention_mask}
    options["scaling"] = query.shape[-1] ** -0.5 if scaling is None else scaling
    ours = not isinstance(key, Tensor) or softcap is not None or s_aux is not None
    ours = ours or _shared_tail(module, query, key, attention_mask)
    if ours and kwargs.get("output_attentions"):
        _warn_of_weights()
    if isinstance(key, Tensor) and not torch.compiler.is_compiling():
        meet(query, key, attention_mask)
    if not isinstance(key, Tensor):
        if kwargs.get("position_bias") is not None:
            if isinstance(key, CodesHandle):
                key.take_back()
            raise UnsupportedModelError(
                f"{type(module).__name__} adds a learned position bias to its logits, which "
                "attention on codes does not do: use TurboQuantCache(model.config, ...) instead."
            )
        # One update gives one handle for keys and values.
        query = as_autocast(query) if torch._C._is_any_autocast_enabled() else query
        if torch.compiler.is_compiling() and isinstance(key, CodesHandle):
            out = _attend_untraced(key, query, options)
        else:
            out = key.attend(query, **options)
    elif not ours:
        return sdpa_attention_forward(
            module,
            query,
            key,
            cast(Tensor, value),
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            **kwargs,
        )
    else:
        out = exact_attention(*map(as_autocast, (query, key, cast(Tensor, value))), **options)
    return out.transpose(1, 2).contiguous(), None


def _weights_recorded() -> bool:
    """Whether transformers records attention weights in this forward pass, for its caller.

    Models that do (GPT-2) need not tell their attention function, and nothing public says so.
    """
    # A tracer cannot ask.
    if _recorder is None or torch.compiler.is_compiling():
        return False
    recorded = _recorder.get()
    return bool(recorded is not None and "attentions" in recorded)


def _warn_of_weights() -> None:
    # From one line, whoever asks: Python says it once.
    warnings.warn(NO_WEIGHTS, stacklevel=1)


def _shared_tail(
    module: torch.nn.Module, query: Tensor, key: Any, attention_mask: Tensor | None
) -> bool:
    """Whether the queries are the last ones of a layer that shares its keys.

    Such models (Gemma 4) drop the queries whose logits nobody asked for. PyTorch's attention would
    take those that are left for the first ones; models know that of `sdpa` by its name.
    """
    if attention_mask is not None or not getattr(module, "is_kv_shared_layer", False):
        return False
    return bool(1 < query.shape[2] < key.shape[2])


def as_autocast(x: Tensor) -> Tensor:
    """`x` in the dtype in which autocast, where it is on, would hand it to attention."""
    if not torch._C._is_any_autocast_enabled() or x.dtype is torch.float64:
        return x
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


@untraced_growth
def _attend_untraced(handle: CodesHandle, query: Tensor, options: dict[str, Any]) -> Tensor:
    # A growing layer is Python's business: it decides what to compress by numbers on the host.
    return handle.attend(query, **options)


def _misuse(action: str) -> str:
    return (
        f"the model {action} the keys or values that the cache returned, but they are codes. "
        "Either the model was switched away from attn_implementation='sixfold' after "
        "TurboQuantCache.for_model, or its attention computes with cached tensors: then use "
        "TurboQuantCache(model.config, ...), which hands out dequantized tensors."
    )


# Known to whoever imports this: a model that was switched keeps the name where it is copied to.
# Without a mask function transformers passes no mask at all, and padding is attended.
AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, mask)
