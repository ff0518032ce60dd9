"""A compressed cache in the place of the `DynamicCache` of `generate`, and what differs then."""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationMixin
from transformers.cache_utils import DynamicLayer

from sixfold import TurboQuantCache
from sixfold.integrations.transformers.layer import TurboQuantLayer

# Scores of the same tokens differ by the order of sums only.
ROUNDING = {torch.float32: 1e-4, torch.float16: 1e-2}
RULED_OUT = 1e6


@dataclass(frozen=True)
class Setting:
    """Which caches the tests run with, and on which prompts.

    Attributes:
        options: Of the cache.
        long: Whether prompts become `PROMPT` tokens, every second one padded on the left; else they
            are the seven tokens of the tests.
        tolerance: Most that `error` may be: about twice what was found.
    """

    options: dict[str, Any]
    long: bool
    tolerance: float

    @property
    def exact(self) -> bool:
        """Whether all tokens stay in full precision, so that results are those of a dense cache."""
        return not self.long


NO_WINDOWS = {"sink_tokens": 0, "recent_window": 0, "fit_tokens": 0}
SETTINGS = {
    "windows": Setting({"bits": 4}, False, 0.01),
    "8 bits": Setting({"bits": 8, **NO_WINDOWS}, True, 0.05),
    "4 bits": Setting({"bits": 4, **NO_WINDOWS}, True, 0.4),
}
MODES = "fused", "dequantized"


@dataclass(frozen=True)
class Output:
    """What a call of `generate` returned.

    Attributes:
        tokens: [sequences, tokens].
        scores: One [sequences, vocabulary] a step, if they were asked for.
        dtype: Of the model; scores are float32 whatever it is.
    """

    tokens: Tensor
    scores: tuple[Tensor, ...]
    dtype: torch.dtype

    @property
    def prompt(self) -> Tensor:
        """The tokens before the first step."""
        return self.tokens[:, : self.tokens.shape[1] - len(self.scores)]


class Recorder:
    """Puts a compressed cache in the place of the `DynamicCache` of `generate`, and takes notes.

    Attributes:
        caches: The caches that were made.
        outputs: What the outermost calls of `generate` returned.
    """

    def __init__(self, setting: Setting, mode: str | None) -> None:
        self.setting, self.mode = setting, mode
        self.caches: list[Cache] = []
        self.outputs: list[Output] = []
        self._depth = 0

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Within it, `generate` makes the caches of this recorder."""
        prepare, generate = GenerationMixin._prepare_cache_for_generation, GenerationMixin.generate

        def prepared(model: Any, config: Any, kwargs: dict[str, Any], *args: Any) -> None:
            given = set(kwargs)
            prepare(model, config, kwargs, *args)
            for name in [k for k in kwargs if k not in given and type(kwargs[k]) is DynamicCache]:
                kwargs[name] = self.replacement(model, kwargs[name])
                if self.mode is not None and config.is_assistant:
                    kwargs[name].activate_past_recording()

        def generated(model: Any, *args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            try:
                out = generate(model, *args, **kwargs)
            finally:
                self._depth -= 1
            if not self._depth:
                tokens = out if isinstance(out, Tensor) else out.sequences
                scores = tuple(getattr(out, "scores", None) or ())
                self.outputs.append(Output(tokens.clone(), scores, model.dtype))
            return out

        with (
            mock.patch.object(GenerationMixin, "_prepare_cache_for_generation", prepared),
            mock.patch.object(GenerationMixin, "generate", generated),
        ):
            yield

    def replacement(self, model: Any, cache: Cache) -> Cache:
        """The cache that `model` gets instead of `cache`."""
        if self.mode is not None:
            options = dict(self.setting.options)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if self.mode == "fused":
                    cache = TurboQuantCache.for_model(model, **options)
                else:
                    cache = TurboQuantCache(model.config.get_text_config(decoder=True), **options)
        self.caches.append(cache)
        return cache

    @property
    def coded(self) -> bool:
        """Whether any cache has turned tokens into codes."""
        layers = [layer for cache in self.caches for layer in cache.layers]
        stores = [layer.store for layer in layers if isinstance(layer, TurboQuantLayer)]
        return any(store is not None and store.history.tokens for store in stores)


def dense(cache: Cache) -> Cache:
    """What a test may look at: the same layers, with the compressed ones dequantized."""
    if not isinstance(cache, TurboQuantCache):
        return cache
    layers: list[Any] = list(cache.layers)
    for index, layer in enumerate(layers):
        if isinstance(layer, TurboQuantLayer):
            layers[index] = DynamicLayer()
            layers[index].keys, layers[index].values = layer.dense()
    return Cache(layers=layers)


def error(ours: Recorder, theirs: Recorder) -> float:
    """Largest relative error of the scores of a test's first two steps of every call.

    Prompts are attended exactly, so that the first step chooses the same token whatever the cache,
    and the second is the first that reads it. A call that continues from a cache reads it in its
    first step, and is left out once its prompt differs.
    """
    sizes = []
    # A test that fails makes fewer calls.
    for mine, other in zip(ours.outputs, theirs.outputs, strict=False):
        if not torch.equal(mine.prompt, other.prompt):
            continue
        for a, b in zip(mine.scores[:2], other.scores[:2], strict=False):
            # What logits processors or beams rule out is not a score.
            valid = ~((a.abs() > RULED_OUT) | (b.abs() > RULED_OUT))
            sizes.append((a - b)[valid].norm() / b[valid].norm())
    return float(torch.stack(sizes).max()) if sizes else 0.0


def difference(ours: Recorder, theirs: Recorder) -> str:
    """How the outputs of a test differ by more than rounding; empty if they do not."""
    if len(ours.outputs) != len(theirs.outputs):
        return f"{len(ours.outputs)} calls of generate instead of {len(theirs.outputs)}"
    for call, (mine, other) in enumerate(zip(ours.outputs, theirs.outputs, strict=True)):
        tolerance = ROUNDING[mine.dtype]
        for step, (a, b) in enumerate(zip(mine.scores, other.scores, strict=True)):
            if not torch.allclose(a, b, rtol=tolerance, atol=tolerance):
                return f"call {call}, step {step}: scores differ by {(a - b).abs().max():.1e}"
        if not torch.equal(mine.tokens, other.tokens):
            return f"call {call}: other tokens"
    return ""


def compared(ours: Recorder, theirs: Recorder) -> tuple[str, str]:
    """Outcome and reason of a test that passes with both caches."""
    setting, size = ours.setting, error(ours, theirs)
    if setting.exact and (said := difference(ours, theirs)):
        return "failed", said
    if not size <= setting.tolerance:
        return "failed", f"scores differ by {size:.2g} of their norm"
    return "passed", ""
