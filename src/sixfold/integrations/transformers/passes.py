"""Notices a forward pass that was interrupted between layers, before it makes anything wrong."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from sixfold._surroundings import outside_inference_mode
from sixfold.errors import SixfoldError
from sixfold.integrations.transformers.combined import IndexedTurboQuantLayer
from sixfold.integrations.transformers.layer import TurboQuantLayer
from sixfold.integrations.transformers.layers import CrossAttentionLayer
from sixfold.integrations.transformers.static import StaticTurboQuantLayer

# Numbers of a state that are compared where nothing else tells that it was changed.
_SAMPLE = 256
_HOW = (
    "a forward pass was interrupted between layers, or left some out. Call cache.recover() to "
    "forget what it added, then repeat it; or cache.reset(), and prefill again."
)
_HOW_STATIC = (
    "a forward pass was interrupted between layers, or left some out, and a static cache cannot go "
    "back. Make it again, with .static(max_tokens), from the cache that it was made of."
)


class ForwardPass:
    """How far the forward pass in progress has come.

    Every layer that a pass reaches must hold as many tokens as the others did before it. Layers
    that no pass has reached yet (early exit) are empty, and may stay so.

    Attributes:
        growing: Layers that hold every token of the text, or the last ones of it.
        first: The first of them.
        last: The last of them.
        reached: Layers of those that the pass has added its tokens to.
        states: Convolution and recurrent states that it has replaced, or changed in place.
        lent: States that a model has read and may change in place, and what tells if it did.
        before: Tokens that layers held before the pass; None until it reaches one that counts them.
        tokens: Tokens that the pass adds to each; None likewise.
        started: Whether there were states to continue, as far as is known.
        unfinished: An operation that changes one layer after the other, while it does.
        shortens: Whether all that it does is to take tokens back.
        waiting: The layer that waits for its queries, or did last.
    """

    def __init__(self, growing: Iterable[int]) -> None:
        self.growing = frozenset(growing)
        self.first, self.last = min(self.growing, default=-1), max(self.growing, default=-1)
        self.restart()

    def restart(self) -> None:
        """Take what the layers hold as it is: the next update begins a pass."""
        self.lent: dict[tuple[int, str, int], tuple[Tensor, int | Tensor]] = {}
        self.unfinished: str | None = None
        self.shortens = False
        self.waiting: TurboQuantLayer | None = None
        self._begin()

    @contextmanager
    def through_all(self, operation: str, shortens: bool = False) -> Iterator[None]:
        """While it lasts layers hold different tokens: nobody may go on from there.

        One that shortens all may be called after another of its kind that was interrupted.
        """
        self.check_finished(shortening=shortens)
        self.unfinished, self.shortens = operation, shortens
        yield
        self.unfinished = None

    def check_finished(self, shortening: bool = False) -> None:
        """Refuse layers of which an operation has changed some only.

        Args:
            shortening: Accept those that have only been shortened.

        Raises:
            SixfoldError: They are such.
        """
        if self.unfinished is None or (shortening and self.shortens):
            return
        cure = "recover()" if self.shortens else "reset(), and prefill again"
        raise SixfoldError(
            f"{self.unfinished} was interrupted between layers, which hold different tokens now: "
            f"call cache.{cure}."
        )

    def _begin(self) -> None:
        self.reached: set[int] = set()
        self.states: set[tuple[int, str, int]] = set()
        self.before: int | None = None
        self.tokens: int | None = None
        self.started: bool | None = None

    def copy(self, layers: Sequence[Any]) -> "ForwardPass":
        """Another of the same state, for a fork of the cache, whose states are tensors of its own.

        Raises:
            SixfoldError: A pass has begun after one that was interrupted.
        """
        self._settle(layers)
        twin = ForwardPass(self.growing)
        twin.reached, twin.states = set(self.reached), set(self.states)
        twin.before, twin.tokens, twin.started = self.before, self.tokens, self.started
        return twin

    def enter(self, layers: Sequence[Any], index: int, tokens: int) -> None:
        """Check that layer `index` may add the tokens of this pass, or of the next.

        Raises:
            SixfoldError: Layers differ in what they have seen.
        """
        # In most steps there is nothing to settle.
        if self.lent or self.unfinished:
            self._settle(layers)
        if index not in self.growing:
            return
        if index in self.reached:
            self._next(layers)
        elif not self.reached:
            self._check_lengths(layers)
        layer = layers[index]
        # Of the usual kind at once: to ask an abstract class what it has instances of takes time.
        usual = type(layer) is TurboQuantLayer
        if not usual and isinstance(layer, StaticTurboQuantLayer):
            return
        held = layer.get_seq_length()
        if not usual and isinstance(layer, IndexedTurboQuantLayer):
            held = layer.tokens_seen
            # A model may index new tokens before or after it adds them.
            if layer.tokens_indexed not in (held, held + tokens):
                raise SixfoldError(
                    f"layer {index} has indexed other tokens than it holds: {_how(layers)}"
                )
        if self.before is None:
            self.before, self.tokens = held, tokens
        if held != self.before or self.started not in (None, held > 0):
            raise SixfoldError(
                f"layer {index} holds {held} tokens where others held {self.before} before this "
                f"forward pass: {_how(layers)}"
            )
        if tokens != self.tokens:
            raise SixfoldError(
                f"layer {index} gets {tokens} tokens where others got {self.tokens}: {_how(layers)}"
            )

    def leave(self, index: int) -> None:
        """Note that layer `index` has added its tokens."""
        if index in self.growing:
            self.reached.add(index)

    def enter_state(self, layers: Sequence[Any], index: int, kind: str, number: int) -> None:
        """The same for a convolution or recurrent state.

        Raises:
            SixfoldError: Layers differ in what they have seen.
        """
        # However often a pass changes it, it counts once.
        self.lent.pop((index, kind, number), None)
        self._settle(layers)
        self._enter_state(layers, index, kind, number)

    def lend(
        self, layers: Sequence[Any], index: int, kind: str, number: int, state: Tensor | None
    ) -> None:
        """Note that a model reads a state: in a step of one token many change it in place.

        Raises:
            SixfoldError: One was changed in place for a second time, and the pass that changed it
                for the first time was interrupted.
        """
        self._settle(layers)
        if state is not None:
            self.lent[index, kind, number] = state, _mark(state)

    def _settle(self, layers: Sequence[Any]) -> None:
        """Count states that have been changed in place."""
        self.check_finished()
        for key in self._changed():
            self._enter_state(layers, *key)
            self.lent.pop(key, None)

    def _changed(self) -> list[tuple[int, str, int]]:
        return [key for key, (state, mark) in self.lent.items() if not _unchanged(state, mark)]

    def _enter_state(self, layers: Sequence[Any], index: int, kind: str, number: int) -> None:
        if (index, kind, number) in self.states:
            self._next(layers)
        # Only the convolution says whether it has seen tokens.
        if kind == "conv":
            started = bool(layers[index].has_previous_state[number])
            expected = self.started if self.before is None else self.before > 0
            if expected not in (None, started):
                raise SixfoldError(
                    f"the states of layer {index} are of another length: {_how(layers)}"
                )
            self.started = started
        self.states.add((index, kind, number))

    def _next(self, layers: Sequence[Any]) -> None:
        """Begin a pass; the one before must have left no layer behind."""
        static = any(isinstance(layers[i], StaticTurboQuantLayer) for i in self.growing)
        if static or self.states:
            self._check_complete(layers)
        else:
            self._check_lengths(layers)
        self._begin()

    def check_complete(self, layers: Sequence[Any]) -> None:
        """Refuse layers of which a forward pass has reached some only.

        Raises:
            SixfoldError: They are such.
        """
        self._settle(layers)
        self._check_complete(layers)

    def _check_complete(self, layers: Sequence[Any]) -> None:
        if (self.reached or self.states) and not self._complete(layers):
            raise SixfoldError(f"the last forward pass has not reached all layers: {_how(layers)}")
        self._check_lengths(layers)

    def spoiled(self, layers: Sequence[Any]) -> bool:
        """Whether states were replaced, or changed, by a pass that has not reached all layers."""
        changed = set(self._changed())
        # Those of a pass that is complete were counted when the next one began.
        return bool(changed & self.states) or (
            bool(changed | self.states) and not self._complete(layers)
        )

    def _complete(self, layers: Sequence[Any]) -> bool:
        """Whether the pass has reached every layer that had seen tokens before it."""
        replaced = self.states.union(self._changed())
        behind = any(i not in self.reached and _length(layers[i]) for i in self.growing)
        if not replaced:
            return not behind
        # Layers before the last that was reached may have changed their states in place.
        last = max(self.reached.union(index for index, _, _ in replaced))
        skipped = any(map(_started, layers[last + 1 :]))
        return not behind and not skipped and _states_due(layers, last) <= replaced

    def _check_lengths(self, layers: Sequence[Any]) -> None:
        # What a pass has reached, every length checked on the way, needs no second look; but an
        # indexer's keys come after that.
        indexed = any(isinstance(layers[i], IndexedTurboQuantLayer) for i in self.growing)
        if len(self.reached) == len(self.growing) and not indexed:
            return
        lengths = {i: n for i in sorted(self.growing) if (n := _length(layers[i]))}
        if len(set(lengths.values())) > 1:
            raise SixfoldError(
                f"layers hold different numbers of tokens, {lengths}: {_how(layers)}"
            )


def _how(layers: Sequence[Any]) -> str:
    static = any(isinstance(layer, StaticTurboQuantLayer) for layer in layers)
    return _HOW_STATIC if static else _HOW


def common_length(layers: Sequence[Any], begun: bool = False) -> int:
    """Tokens that every layer can have seen: those of the shortest.

    A layer without any counts only where the others agree: then a first pass never reached it. If
    the pass in progress is not the first (`begun`), none counts: an early exit leaves it out.
    """
    lengths = [int(layer.get_seq_length()) for layer in layers]
    held = [n for n in lengths if n]
    if held and (begun or len(set(held)) > 1):
        return min(held)
    return min(lengths, default=0)


def longest(layer: Any) -> int:
    """Tokens of which a layer holds anything: an indexer's keys may come before or after."""
    held = int(layer.get_seq_length())
    if isinstance(layer, IndexedTurboQuantLayer):
        return max(held, layer.tokens_seen, layer.tokens_indexed)
    return held


def grows(layer: Any) -> bool:
    """Whether a layer counts the tokens of the text."""
    plain = isinstance(layer, DynamicLayer) and not isinstance(layer, CrossAttentionLayer)
    return isinstance(layer, TurboQuantLayer) or plain


def _length(layer: Any) -> int:
    # A static layer's length is on the device: it counts as one of the layers a pass must reach.
    if isinstance(layer, StaticTurboQuantLayer):
        return 1
    # A list of layers is open to whoever has the cache: what else is in it has no tokens.
    return int(layer.get_seq_length()) if isinstance(layer, CacheLayerMixin) else 0


def _started(layer: Any) -> bool:
    return any(getattr(layer, "has_previous_state", {}).values())


def _states_due(layers: Sequence[Any], index: int) -> set[tuple[int, str, int]]:
    """States that a pass gives a layer: those it has, and those that all others of its kind have.

    In its first pass it has none before it gets them.
    """
    held = [(i, _states(layer)) for i, layer in enumerate(layers) if _started(layer)]
    others = [states for i, states in held if i != index]
    due = dict(held).get(index)
    if due is None:
        return set()
    due = due | set.intersection(*others) if others else due
    return {(index, *state) for state in due}


def _states(layer: Any) -> set[tuple[str, int]]:
    kinds = {"conv": layer.conv_states, "recurrent": layer.recurrent_states}
    return {(kind, i) for kind, states in kinds.items() for i, x in states.items() if x is not None}


def _mark(state: Tensor) -> int | Tensor:
    """What tells whether a tensor was changed since: how often PyTorch has seen it change."""
    if not state.is_inference():
        return state._version
    # Inference mode does not count.
    return state.detach().take(_places(state.numel(), state.device))


@lru_cache(maxsize=64)
@outside_inference_mode
def _places(count: int, device: torch.device) -> Tensor:
    """Where a state of so many numbers is looked at: at no steps that an axis could share.

    A step may change one column of each channel only, as a window over the last tokens moves on,
    and equal tokens leave the others as they are.
    """
    if count <= _SAMPLE:
        return torch.arange(count, device=device)
    golden = (5**0.5 - 1) / 2
    turns = torch.arange(_SAMPLE, dtype=torch.float64, device="cpu") * golden % 1
    return (turns * count).long().to(device)


def _unchanged(state: Tensor, mark: int | Tensor) -> bool:
    found = _mark(state)
    if isinstance(mark, Tensor) and isinstance(found, Tensor):
        return torch.equal(found, mark)
    return type(found) is type(mark) is int and found == mark
