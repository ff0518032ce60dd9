"""Shows a layer the queries of attention that is not ours, on keys that are handed out as tensors.

`Cache.update` is given keys and values alone, but a key map that knows the queries loses a third
less (docs/key_map.md). So until a layer has its map, the keys it hands out tell it what they are
multiplied with. They are tensors like any other, and nothing that is computed with them changes.
"""

import copy
from typing import Any

import torch
from torch import Tensor

from sixfold.cache import CompressedLayer

# Names of transformers' attention that calls PyTorch's own functions. Others hand keys to kernels
# and compilers, which want plain tensors; a config that no model was made of names none.
WATCHED = ("sdpa", "eager", "sixfold")
# What keys go through before they meet queries: repeated for each group, turned for a product.
_VIEWS = {
    *("__getitem__", "unsqueeze", "expand", "reshape", "view", "repeat_interleave", "detach"),
    *("transpose", "permute", "contiguous", "to", "float"),
}
_PRODUCTS = {"matmul", "__matmul__"}
_SDPA = torch.nn.functional.scaled_dot_product_attention
_PARAMETERS = ("query", "key", "value", "attn_mask")


class Watch:
    """Waits for the queries of the tokens that a layer has added last, then compresses them.

    Attributes:
        waiting: The layer, and the keys that it has handed out; None once it has seen queries, or
            nobody waits any more.
        new: How many tokens were added.
    """

    __slots__ = ("new", "waiting")

    def __init__(self, store: CompressedLayer, handed: Tensor, new: int) -> None:
        self.waiting: tuple[CompressedLayer, Tensor] | None = (store, handed)
        self.new = new

    def watched(self, keys: Tensor) -> Tensor:
        """`keys`, which tell this watch what they are multiplied with."""
        watched = keys.as_subclass(_WatchedKeys)
        watched.watch = self
        return watched

    def end(self) -> None:
        """Compress, whether queries were seen or not."""
        waiting, self.waiting = self.waiting, None
        if waiting is not None:
            waiting[0].compress()

    def meets(self, query: Any, keys: Tensor, mask: Any = None, shown: bool = True) -> None:
        """Learn from `query`, if it can be the queries of the tokens added last, and compress.

        Args:
            query: [batch, heads, queries, key_dim].
            keys: What it is multiplied with, [batch, any heads, tokens, key_dim].
            mask: What `CompressedLayer.attend` takes.
            shown: Whether that is known to be the mask.
        """
        if self.waiting is None:
            return
        store, handed = self.waiting
        if not _asks(query, self.new, keys, handed):
            return
        fits = isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[2] == self.new
        if mask is not None and not (fits and self.new <= mask.shape[3] <= store.window.tokens):
            mask, shown = None, False
        store.observe(query.detach(), mask, shown)
        self.end()


def _asks(query: Any, new: int, keys: Tensor, handed: Tensor) -> bool:
    """Whether a product is one of queries of `new` tokens with the keys that were handed out."""
    if not isinstance(query, Tensor) or isinstance(query, _WatchedKeys) or query.ndim != 4:
        return False
    batch, heads, tokens, dim = handed.shape
    asked, given = query.shape, keys.shape
    if (asked[0], *asked[2:]) != (batch, new, dim) or asked[1] % heads:
        return False
    if (given[0], *given[2:]) != (batch, tokens, dim) or given[1] not in (heads, asked[1]):
        return False
    # Heads and channels in their order: the newest token tells.
    newest = handed[:, :, -1].repeat_interleave(given[1] // heads, 1)
    return torch.equal(newest.to(keys.dtype), keys[:, :, -1])


class _WatchedKeys(Tensor):
    """Keys that tell a `Watch` what they are multiplied with, and plain tensors otherwise."""

    watch: Watch

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **given)
            # A tracer follows keys, and no Python beside them.
            if not torch.compiler.is_compiling():
                return cls._watched(func, out, args, given)
        return out

    @classmethod
    def _watched(cls, func: Any, out: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        name = getattr(func, "__name__", "")
        if name in _VIEWS and args and isinstance(args[0], cls):
            return args[0].watch.watched(out)
        if func is _SDPA:
            given = {**dict(zip(_PARAMETERS, args, strict=False)), **given}
            if isinstance(keys := given["key"], cls) and keys.ndim == 4:
                keys.watch.meets(given["query"], keys, given.get("attn_mask"))
        elif name in _PRODUCTS and len(args) == 2:
            if isinstance(keys := args[1], cls) and keys.ndim == 4:
                # The mask is added later.
                keys.watch.meets(args[0], keys.mT, shown=False)
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.as_subclass(Tensor), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return repr(self.as_subclass(Tensor))


def unwatched(keys: Tensor, query: Tensor, mask: Tensor | None) -> Tensor:
    """Keys as a plain tensor; if a layer waits for their queries, it has seen them."""
    if not isinstance(keys, _WatchedKeys):
        return keys
    plain = keys.as_subclass(Tensor)
    keys.watch.meets(query, plain, mask)
    return plain
