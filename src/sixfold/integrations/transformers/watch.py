"""Shows a layer the queries of attention that is not ours, on keys that are handed out as tensors.

`Cache.update` is given keys and values alone, but a key map that knows the queries loses a third
less (docs/key_map.md). So until a layer has its map, whoever calls attention functions of
transformers with the keys that it has handed out shows it the queries, and the mask.
"""

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from sixfold.cache import CompressedLayer

# Of transformers; eager attention is a function of each model.
WATCHED = ("sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")


class Watch:
    """Waits for the queries of the tokens that a layer has added last, then compresses them.

    Attributes:
        waiting: The layer, and the keys that it has handed out; None once it has seen queries, or
            nobody waits any more.
        new: How many tokens were added.
    """

    __slots__ = ("__weakref__", "new", "waiting")

    def __init__(self, store: CompressedLayer, handed: Tensor, new: int) -> None:
        watch_attention()
        self.waiting: tuple[CompressedLayer, Tensor] | None = (store, handed)
        self.new = new
        _latest.watch = weakref.ref(self)

    @property
    def unseen(self) -> bool:
        """Whether it still waits."""
        return self.waiting is not None

    def end(self) -> None:
        """Compress, whether queries were seen or not."""
        waiting, self.waiting = self.waiting, None
        if waiting is not None:
            waiting[0].compress()

    def meet(self, query: Tensor, mask: Any) -> None:
        """Learn from the queries of the tokens that were added last, and compress."""
        if self.waiting is None:
            return
        store = self.waiting[0]
        batch, heads, held, dim = store.window.keys.shape
        asked = query.shape
        if (asked[0], *asked[2:]) != (batch, self.new, dim) or asked[1] % heads:
            return
        fits = isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[2] == self.new
        shown = mask is None or (fits and self.new <= mask.shape[3] <= held)
        store.observe(query.detach(), mask if shown else None, shown)
        self.end()


class _Latest(threading.local):
    """The watch of the keys that were handed out last: attention follows in the same thread."""

    watch: "weakref.ref[Watch] | None" = None


_latest = _Latest()


def meet(query: Any, keys: Any, mask: Any) -> None:
    """Show queries, and their mask, to the layer that waits for them because of these keys."""
    watch = None if _latest.watch is None else _latest.watch()
    if watch is None or watch.waiting is None or watch.waiting[1] is not keys:
        return
    if type(query) is Tensor and query.ndim == 4:
        watch.meet(query, mask)


def watch_attention() -> None:
    """From now on transformers' attention functions show what they are called with."""
    known = AttentionInterface()
    for name in WATCHED:
        # Others may register theirs at any time.
        if name in known and known[name] not in _watched:
            watched = _showing(known[name])
            _watched.add(watched)
            AttentionInterface.register(name, watched)


_watched: set[Callable[..., Any]] = set()


def _showing(attention: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(attention)
    def run(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            meet(query, key, args[0] if args else kwargs.get("attention_mask"))
        return attention(module, query, key, value, *args, **kwargs)

    return run
