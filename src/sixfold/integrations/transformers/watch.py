"""Shows a layer the queries of attention that is not ours, on keys that are handed out as tensors.

`Cache.update` is given keys and values alone, but a key map that knows the queries loses a third
less (docs/key_map.md). So until a layer has its map, the keys it hands out tell it what they are
multiplied with. They are tensors like any other, and nothing that is computed with them changes.
"""

from typing import Any

import torch
from torch import Tensor

from sixfold.cache import CompressedLayer

# Names of transformers' attention that calls PyTorch's own functions. Others hand keys to kernels
# and compilers, which want plain tensors.
WATCHED = ("sdpa", "eager", "sixfold")
# What keys go through before they meet queries: repeated for each group, turned for a product.
_VIEWS = {
    *("__getitem__", "unsqueeze", "expand", "reshape", "view", "repeat_interleave"),
    *("transpose", "permute", "contiguous", "to", "float"),
}
_PRODUCTS = {"matmul", "__matmul__"}
_SDPA = torch.nn.functional.scaled_dot_product_attention
_PARAMETERS = ("query", "key", "value", "attn_mask")


class Watch:
    """Waits for the queries of the tokens that a layer has added last, then compresses them.

    Attributes:
        store: The layer; None once it has seen them, or nobody waits any more.
        new: How many tokens were added.
    """

    __slots__ = ("new", "store")

    def __init__(self, store: CompressedLayer, new: int) -> None:
        self.store: CompressedLayer | None = store
        self.new = new

    def keys(self, keys: Tensor) -> Tensor:
        """`keys`, which tell this watch what they are multiplied with."""
        watched = keys.as_subclass(_WatchedKeys)
        watched.watch = self
        return watched

    def end(self) -> None:
        """Compress, whether queries were seen or not."""
        store, self.store = self.store, None
        if store is not None:
            store.compress()

    def meets(self, query: Any, mask: Any = None, shown: bool = True) -> None:
        """Learn from `query`, if it can be the queries of the tokens added last, and compress.

        Args:
            query: [batch, heads, queries, key_dim].
            mask: What `CompressedLayer.attend` takes.
            shown: Whether that is known to be the mask.
        """
        store = self.store
        if store is None or not isinstance(query, Tensor) or query.ndim != 4:
            return
        batch, heads, held, dim = store.window.keys.shape
        if (query.shape[0], query.shape[2:]) != (batch, (self.new, dim)) or query.shape[1] % heads:
            return
        fits = isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[2] == self.new
        if mask is not None and not (fits and self.new <= mask.shape[3] <= held):
            mask, shown = None, False
        store.observe(query.detach().to(store.window.keys.device), mask, shown)
        self.end()


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
            name = getattr(func, "__name__", "")
            if name in _VIEWS and args and isinstance(args[0], cls):
                return args[0].watch.keys(out)
            if func is _SDPA:
                given = {**dict(zip(_PARAMETERS, args, strict=False)), **given}
                if isinstance(keys := given["key"], cls):
                    keys.watch.meets(given["query"], given.get("attn_mask"))
            elif name in _PRODUCTS and len(args) == 2 and isinstance(keys := args[1], cls):
                # The mask is added later.
                keys.watch.meets(args[0], shown=False)
        return out


def unwatched(keys: Tensor, query: Tensor, mask: Tensor | None) -> Tensor:
    """Keys as a plain tensor; if a layer waits for their queries, it has seen them."""
    if not isinstance(keys, _WatchedKeys):
        return keys
    keys.watch.meets(query, mask)
    return keys.as_subclass(Tensor)
