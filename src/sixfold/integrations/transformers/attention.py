"""The attention and mask functions that transformers calls under the name `sixfold`."""

import warnings
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sixfold.cache import CompressedLayer, StaticLayer
from sixfold.errors import UnsupportedModelError
from sixfold.kernels.attention import exact_attention

NAME = "sixfold"
NO_WEIGHTS = (
    "attention on codes computes no attention weights: `output_attentions=True` gives none. For "
    'weights use TurboQuantCache(model.config, ...) and model.set_attn_implementation("eager").'
)


class CodesHandle:
    """Stands for the keys or values of a layer between `Cache.update` and the attention function.

    Model code may pass it on but not compute with it: there is no dense tensor to compute with.
    The layer receives the new tokens only when they are attended, so an error before that loses
    nothing.
    """

    __slots__ = ("new", "store")

    def __init__(self, store: CompressedLayer, new: Tensor) -> None:
        self.store = store
        self.new: Tensor | None = new

    def attend(self, values: "CodesHandle", query: Tensor, **options: Any) -> Tensor:
        """Add the new tokens, these keys and those `values`, to the layer; attend to all it holds.

        Raises:
            UnsupportedModelError: Called again: the first call has turned them into codes.
        """
        keys, self.new = self.new, None
        if keys is None or values.new is None:
            raise UnsupportedModelError(_misuse("attends twice to"))
        self.store.append(keys, values.new)
        return self.store.attend(query, **options)

    def __getattr__(self, name: str) -> NoReturn:
        raise UnsupportedModelError(_misuse(f"reads `.{name}` of"))

    @classmethod
    def __torch_function__(cls, func: Any, *_: Any) -> NoReturn:
        raise UnsupportedModelError(_misuse(f"calls {getattr(func, '__name__', func)} on"))


class StaticHandle:
    """A `CodesHandle` of a static layer: one that torch.compile can trace, without the guards."""

    def __init__(self, layer: StaticLayer, new: Tensor) -> None:
        self.layer = layer
        self.new = new

    def attend(self, values: "StaticHandle", query: Tensor, **options: Any) -> Tensor:
        """Add the new token to the layer; attend to all it holds."""
        # The layer knows the padding of its prefill, and causality needs no mask.
        del options["mask"]
        self.layer.append(self.new, values.new)
        return self.layer.attend(query, **options)


def register() -> None:
    """Make `attn_implementation="sixfold"` known to transformers; safe to call again.

    The mask function must be registered too: without one transformers passes no mask at all and
    padding is attended.
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


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
    if not isinstance(key, Tensor) or not isinstance(value, Tensor):
        if kwargs.get("position_bias") is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} adds a learned position bias to its logits, which "
                "attention on codes does not do: use TurboQuantCache(model.config, ...) instead."
            )
        if kwargs.get("output_attentions"):
            warnings.warn(NO_WEIGHTS, stacklevel=2)
        # Of one update: keys' and values' handles are of one kind.
        out = cast(Any, key).attend(value, query, **options)
    elif softcap is None and s_aux is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    else:
        out = exact_attention(query, key, value, **options)
    return out.transpose(1, 2).contiguous(), None


def _misuse(action: str) -> str:
    return (
        f"the model {action} the keys or values that the cache returned, but they are codes. "
        "Either the model was switched away from attn_implementation='sixfold' after "
        "TurboQuantCache.for_model, or its attention computes with cached tensors: then use "
        "TurboQuantCache(model.config, ...), which hands out dequantized tensors."
    )
