"""What compression costs in language modelling: the same text through both caches.

A window's first tokens are prefilled, where attention is exact; the rest follows in short chunks
through the cache, so that every scored prediction reads its history from the codes. The
uncompressed cache takes the same chunks, and the two next-token distributions are compared.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from sixfold.errors import SixfoldError
from sixfold.eval.caches import (
    MakeCache,
    half_precision_bytes,
    held_bytes,
    uncompressed,
)
from sixfold.eval.checkpoint import Checkpoint
from sixfold.eval.estimate import Estimate
from sixfold.eval.progress import Progress, Steps, no_progress
from sixfold.integrations.transformers.keyword import cache_argument

UNCOMPRESSED = "uncompressed"


@dataclass(frozen=True, slots=True)
class CacheComparison:
    """A cache against the uncompressed model, on the same predictions.

    Attributes:
        perplexity: Through the cache.
        uncompressed_perplexity: Through the uncompressed cache.
        nll_increase: Nats a token lost, window by window.
        perplexity_change: Relative change of the perplexity, window by window.
        kl: Mean KL(uncompressed || cache) of the next-token distributions, in nats.
        kl_p99: Its 99th percentile over tokens.
        kl_by_window: Mean KL of every window, to pair comparisons with.
        top1_agreement: Fraction of predictions whose most likely token is the same.
        windows: Windows of text.
        scored_tokens: Predictions compared, over all windows.
        nbytes: Bytes held at the end, summed over windows.
        compression_ratio: 16-bit bytes of the same tokens over `nbytes`.
    """

    perplexity: float
    uncompressed_perplexity: float
    nll_increase: Estimate
    perplexity_change: Estimate
    kl: Estimate
    kl_p99: float
    kl_by_window: tuple[float, ...]
    top1_agreement: Estimate
    windows: int
    scored_tokens: int
    nbytes: int
    compression_ratio: float

    @property
    def bits_per_value(self) -> float:
        """Bits held a key or value coordinate, everything counted."""
        return 16 / self.compression_ratio

    def kl_difference(self, other: "CacheComparison") -> Estimate:
        """Mean KL minus that of `other`, paired window by window.

        Raises:
            SixfoldError: They were not measured on the same number of windows.
        """
        mine, theirs = (
            torch.tensor(self.kl_by_window, device="cpu"),
            torch.tensor(other.kl_by_window, device="cpu"),
        )
        if len(mine) != len(theirs):
            raise SixfoldError(
                "expected comparisons on the same windows, "
                f"got {len(mine)} and {len(theirs)} of them"
            )
        return Estimate.over(mine - theirs)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {"bits_per_value": self.bits_per_value, **asdict(self)}


def windows_of(
    tokenizer: PreTrainedTokenizerBase, text: str, tokens: int, count: int | None = None
) -> Int[Tensor, "windows tokens"]:
    """Cut text into windows of `tokens` tokens that do not overlap, at most `count` of them.

    Raises:
        SixfoldError: The text is shorter than one window.
    """
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], device="cpu")
    whole = len(ids) // tokens
    if whole == 0:
        raise SixfoldError(
            f"the text has {len(ids)} tokens, fewer than one window of {tokens}: "
            "give a longer text or a shorter window"
        )
    return ids[: whole * tokens].view(whole, tokens)[:count]


def compare_caches(
    model: PreTrainedModel,
    windows: Int[Tensor, "windows tokens"],
    caches: Mapping[str, MakeCache],
    *,
    prefill: int,
    prefill_chunk: int | None = None,
    chunk: int = 64,
    progress: Progress = no_progress,
    partial: bool = False,
    checkpoint: Checkpoint | None = None,
) -> dict[str, CacheComparison]:
    """Measure several caches against the uncompressed model on the same text.

    Args:
        model: A causal language model.
        windows: Token ids; every window is a text of its own.
        caches: What to measure, by name.
        prefill: First tokens of a window, which are not scored.
        prefill_chunk: Tokens a forward pass of those; all at once by default.
        chunk: Tokens a forward pass after that. Those of one chunk see each other exactly.
        progress: Called after every prefill and chunk of every cache.
        partial: Whether an interrupt (Ctrl-C) gives what windows before it have shown.
        checkpoint: Remembers windows that were read.

    Returns:
        The comparison for every name.

    Raises:
        SixfoldError: Nothing is left to score after the prefill.
        KeyboardInterrupt: As always, or in the first window.
    """
    if not 0 < prefill < windows.shape[1] - 1:
        raise SixfoldError(
            f"prefill must leave tokens to score: expected 1 to {windows.shape[1] - 2} "
            f"for windows of {windows.shape[1]} tokens, got {prefill}"
        )
    tallies = {name: _Tally() for name in caches}
    starts = range(prefill, windows.shape[1] - 1, chunk)
    per_window = (1 + len(starts)) * (1 + len(caches))
    steps = Steps(progress, len(windows) * per_window)
    checkpoint = Checkpoint() if checkpoint is None else checkpoint

    def read(window: Int[Tensor, " tokens"]) -> dict[str, dict[str, Any]]:
        found = {name: _Tally(windows=1) for name in caches}
        exact, held = uncompressed(model), {name: make(model) for name, make in caches.items()}
        for name, cache in ((UNCOMPRESSED, exact), *held.items()):
            fill(model, window[:prefill], cache, prefill_chunk)
            steps.done(name)
        for start in starts:
            ids, targets = window[:-1][start:][:chunk], window[1:][start:][:chunk]
            reference = _log_probabilities(model, ids, exact)
            steps.done(UNCOMPRESSED)
            for name, cache in held.items():
                found[name].add(reference, _log_probabilities(model, ids, cache), targets)
                steps.done(name)
        for name, cache in held.items():
            found[name].nbytes = held_bytes(cache)
            found[name].plain_bytes = half_precision_bytes(exact)
        return {name: tally.to_dict() for name, tally in found.items()}

    for number, window in enumerate(windows):
        if (key := f"window {number}") in checkpoint:
            steps.done(key, per_window)
        try:
            found = checkpoint.once(key, functools.partial(read, window))
        except KeyboardInterrupt:
            if partial and number:
                break
            raise
        for name, tally in tallies.items():
            tally.extend(_Tally.from_dict(found[name]))
    return {name: tally.summary() for name, tally in tallies.items()}


@dataclass
class _Tally:
    """Per-token values of windows, one after the other."""

    loss: list[Tensor] = field(default_factory=list)
    reference_loss: list[Tensor] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)
    agrees: list[Tensor] = field(default_factory=list)
    nbytes: int = 0
    plain_bytes: int = 0
    windows: int = 0

    def add(
        self,
        reference: Float[Tensor, "tokens vocabulary"],
        candidate: Float[Tensor, "tokens vocabulary"],
        targets: Int[Tensor, " tokens"],
    ) -> None:
        index = targets[:, None].to(reference.device)
        self.loss.append(-candidate.gather(1, index).flatten())
        self.reference_loss.append(-reference.gather(1, index).flatten())
        self.kl.append((reference.exp() * (reference - candidate)).sum(1))
        self.agrees.append((reference.argmax(1) == candidate.argmax(1)).float())

    def extend(self, other: "_Tally") -> None:
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values, every number as it is."""
        return {
            name: torch.cat(value).tolist() if isinstance(value, list) else value
            for name, value in vars(self).items()
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "_Tally":
        """Inverse of `to_dict`."""
        found: dict[str, Any] = {
            name: [torch.tensor(value, device="cpu")] if isinstance(value, list) else value
            for name, value in plain.items()
        }
        return cls(**found)

    def _by_window(self, values: list[Tensor]) -> Float[Tensor, "windows tokens"]:
        return torch.cat(values).view(self.windows, -1).double().cpu()

    def summary(self) -> CacheComparison:
        loss, reference_loss = self._by_window(self.loss), self._by_window(self.reference_loss)
        kl, lost = self._by_window(self.kl), (loss - reference_loss).mean(1)
        return CacheComparison(
            perplexity=math.exp(loss.mean()),
            uncompressed_perplexity=math.exp(reference_loss.mean()),
            nll_increase=Estimate.over(lost),
            perplexity_change=Estimate.over(lost.expm1()),
            kl=Estimate.over(kl.mean(1)),
            kl_p99=float(kl.flatten().quantile(0.99)),
            kl_by_window=tuple(kl.mean(1).tolist()),
            top1_agreement=Estimate.over(self._by_window(self.agrees).mean(1)),
            windows=self.windows,
            scored_tokens=kl.numel(),
            nbytes=self.nbytes,
            compression_ratio=self.plain_bytes / self.nbytes,
        )


@torch.no_grad()
def fill(
    model: PreTrainedModel, ids: Int[Tensor, " tokens"], cache: Cache, chunk: int | None = None
) -> None:
    """Prefill through the base model, `chunk` tokens a forward pass, by default all of them.

    No logits over the vocabulary are computed.
    """
    for part in ids[None].to(model.device).split(chunk or len(ids), 1):
        model.base_model(input_ids=part, **cache_argument(cache), use_cache=True)


@torch.no_grad()
def _log_probabilities(
    model: PreTrainedModel, ids: Int[Tensor, " tokens"], cache: Cache
) -> Float[Tensor, "tokens vocabulary"]:
    out = model(input_ids=ids[None].to(model.device), **cache_argument(cache), use_cache=True)
    logits: Tensor = out.logits[0].float()
    return logits.log_softmax(-1)
