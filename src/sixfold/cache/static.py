"""A compressed layer whose tensors never change size or place: for compiled steps and CUDA graphs.

Every step runs the same kernels on the same memory, whether or not it completes a page, and the
host neither decides nor waits: what a step does depends on counters on the device.
"""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from sixfold._surroundings import outside_autocast, outside_inference_mode
from sixfold.arguments import floating, shown, whole
from sixfold.cache.affine import MIN_TOKENS
from sixfold.cache.dense import DenseTokens, check_tokens
from sixfold.cache.layer import CompressedLayer
from sixfold.cache.masks import with_hidden
from sixfold.cache.pages import PagedHistory, Slab
from sixfold.errors import ShapeError, SixfoldError
from sixfold.kernels.types import Mask, Pages, Past, Softmax, Tokens
from sixfold.packing import PAGE_TOKENS

# Sequences are never so long: a mistake that would be noticed by the memory it takes.
MOST_TOKENS = 2**31 - 1


class StaticLayer:
    """The tokens of a `CompressedLayer`, with room for a number of tokens fixed in advance.

    Made after a prefill, for decoding one token of every sequence a step: `append`, then `attend`.
    Both change tensors in place only. Left padding is as the prefill's masks showed it, or else as
    its keys do.

    Attributes:
        sliding_window: Tokens a query sees, itself included; None for all.
        max_tokens: Tokens a sequence that can be held.
        pages: Pages written so far.
        coded: Tokens in them.
        recent: Tokens in the window.
    """

    @outside_autocast
    @outside_inference_mode
    def __init__(self, layer: CompressedLayer, max_tokens: int) -> None:
        """Copy what `layer` holds.

        Args:
            layer: A layer that has compressed its first page.
            max_tokens: Tokens a sequence to make room for, those of `layer` included.

        Raises:
            SixfoldError: Nothing is compressed yet, or there are more tokens than that already.
        """
        if not isinstance(layer, CompressedLayer):
            raise SixfoldError(f"layer must be a CompressedLayer, got {shown(layer)}")
        max_tokens = whole("max_tokens", max_tokens, 0, MOST_TOKENS)
        if layer.prefix is None:
            raise SixfoldError(
                f"a static cache is made of codes, and this layer's {layer.held} tokens are still "
                "too few: prefill a page and the recent window first, "
                f"{layer.policy.recent_window + PAGE_TOKENS} tokens or more, of every sequence "
                f"{layer.policy.sink_tokens + MIN_TOKENS} or more beside its padding."
            )
        if max_tokens < layer.held:
            raise SixfoldError(
                f"max_tokens must be at least the {layer.held} tokens held, got {max_tokens}."
            )
        self.max_tokens, self.sliding_window = max_tokens, layer.sliding_window
        # Seen before, and let go of: positions count on.
        self.evicted = layer.evicted
        # Nobody shows it a mask: what looks like padding stays hidden.
        self.prefix = layer.prefix
        device = layer.padding.device
        # What makes its tables cannot be traced.
        self.code = layer.code.on(device)
        room = max(max_tokens - layer.history.tokens - layer.policy.recent_window, 0)
        self._take_pages(layer.history, len(layer.padding), -(-room // PAGE_TOKENS), device)
        size = layer.policy.recent_window + PAGE_TOKENS
        self.window_keys = _padded(layer.window.keys, size)
        self.window_values = _padded(layer.window.values, size)
        self.recent = torch.tensor([layer.window.tokens], device=device)
        self.coded = torch.tensor([layer.history.tokens], device=device)
        for x in self._own():
            # What a compiled step writes in place: without this it is not captured in a graph.
            torch._dynamo.mark_static_address(x)

    def _take_pages(
        self, history: PagedHistory, batch: int, more: int, device: torch.device
    ) -> None:
        lengths = torch.cat([run.lengths for run in history.runs])
        held = len(lengths)
        total = held + more
        # One page more than there are tokens for: where a step writes that completes none.
        self.slab = Slab.allocate(
            (total + 1) * batch,
            history.kv_heads,
            history.key_bytes,
            history.value_bytes,
            device,
        )
        for index, target in enumerate(self.slab.pool):
            parts = [run.slab.pool[index][run.slots] for run in history.runs]
            target[: held * batch] = torch.cat(parts, 1).transpose(0, 1).flatten(0, 1)
            # Scales of no token yet: kernels may read them, and garbage could be NaN.
            target[held * batch :] = 0
        slots = torch.arange((total + 1) * batch, device=device).view(total + 1, batch).T
        self.table, self.spare = slots[:, :total].contiguous(), slots[:, total:].contiguous()
        later = torch.arange(more, device=device) * PAGE_TOKENS + history.tokens
        self.starts = torch.cat([lengths.cumsum(0) - lengths, later])
        self.lengths = torch.nn.functional.pad(lengths, (0, more))
        self.pages = torch.tensor([held], device=device)

    @outside_autocast
    @torch.no_grad()
    def append(
        self,
        keys: Float[Tensor, "batch kv_heads tokens key_dim"],
        values: Float[Tensor, "batch kv_heads tokens value_dim"],
    ) -> None:
        """Add a token in full precision.

        Beyond `max_tokens` the device fails an assertion.

        Raises:
            ShapeError: More than one token, or other sizes or dtypes than those of the tokens held.
        """
        if not torch.compiler.is_compiling():
            check_tokens(keys, values)
        for name, new, held in (
            ("keys", keys, self.window_keys),
            ("values", values, self.window_values),
        ):
            expected = (*held.shape[:2], 1, held.shape[3])
            if new.shape != expected or new.dtype != held.dtype:
                raise ShapeError(
                    f"{name}: a static layer takes one {held.dtype} token a step, "
                    f"{list(expected)}, got {new.dtype} {list(new.shape)}. Convert the growing "
                    "cache with .to(dtype=...) before `static`, if the model's dtype has changed."
                )
        torch._assert_async(
            self.count < self.max_tokens,
            "the static cache is full: make it with a larger max_tokens",
        )
        self.window_keys.index_copy_(2, self.recent, keys)
        self.window_values.index_copy_(2, self.recent, values)
        self.recent += 1

    @outside_autocast
    @torch.no_grad()
    def attend(
        self,
        query: Float[Tensor, "batch heads 1 key_dim"],
        *,
        scaling: float,
        mask: Mask | None = None,
        softcap: float | None = None,
        sink_logits: Float[Tensor, " heads"] | None = None,
    ) -> Float[Tensor, "batch heads 1 value_dim"]:
        """Attention of the newest token over everything held, then a page, if one is full.

        Args:
            query: The query of the token appended last.
            scaling: Factor of the logits.
            mask: Attended tokens; columns are all tokens ever seen and all there is room for.
                Without one all that the prefill left and all that came after it.
            softcap: Logits become ``softcap·tanh(logit/softcap)``.
            sink_logits: A learned logit a head without a value (GPT-OSS).

        Raises:
            SixfoldError: The query is no dense tensor of numbers, or has a derivative in forward
                mode.
            ShapeError: The mask has another number of columns.
        """
        if not torch.compiler.is_compiling():
            floating("query", query)
        if mask is not None:
            mask = self._fitted(mask)
        prefix = self.prefix
        end, first = self.count, prefix.end
        if self.sliding_window is not None:
            first = torch.maximum(first, end - self.sliding_window)
        batch = first.shape[0]
        window = Tokens(
            self.window_keys,
            self.window_values,
            self.coded.expand(batch).contiguous(),
            first,
            end.expand(batch).contiguous(),
        )
        pages = Pages(self.slab.pool, self.table, self.starts[None], self.lengths[None], 0)
        out = self.code.attend(
            query,
            [window],
            Past.of([pages], prefix.key_map, first, prefix.part),
            end.expand(batch) - 1,
            Softmax(scaling, mask, softcap=softcap, sink_logits=sink_logits),
        )
        self._compress()
        return out

    def _fitted(
        self, mask: Mask
    ) -> Bool[Tensor, "#batch #heads queries fit"] | Float[Tensor, "#batch #heads queries fit"]:
        """Columns of all that may be held, places in memory that stay unused included."""
        columns = self.evicted + self.max_tokens
        if mask.shape[-1] != columns:
            raise ShapeError(
                f"mask: expected {columns} columns, {self.evicted} tokens that a sliding window "
                f"has let go of and {self.max_tokens} there is room for, got {list(mask.shape)}: "
                "pass an attention_mask of that length, or none."
            )
        places = PAGE_TOKENS * (self.table.shape[1] + 1) + self.window_keys.shape[2]
        return with_hidden(mask[..., self.evicted :], 0, places - self.max_tokens)

    def _compress(self) -> None:
        """Write the window's first page to its place if the window is full, else to the spare."""
        full = self.recent == self.window_keys.shape[2]
        page = self.pages.clamp(max=max(self.table.shape[1] - 1, 0))
        own = self.table.index_select(1, page) if self.table.shape[1] else self.spare
        slots = torch.where(full, own, self.spare)
        oldest = self.window.slice(0, PAGE_TOKENS)
        self.code.store(oldest.keys, oldest.values, slots, self.slab.pool, self.prefix.key_map)
        for window in (self.window_keys, self.window_values):
            moved = torch.roll(window, -PAGE_TOKENS, 2)
            window.copy_(torch.where(full, moved, window))
        if self.table.shape[1]:
            length = torch.where(full, PAGE_TOKENS, self.lengths.index_select(0, page))
            self.lengths.index_copy_(0, page, length)
        self.pages += full
        self.coded += PAGE_TOKENS * full
        self.recent -= PAGE_TOKENS * full

    @property
    def window(self) -> DenseTokens:
        """The buffer of recent tokens, in part unused."""
        return DenseTokens(self.window_keys, self.window_values)

    @property
    def length(self) -> int:
        """Tokens a sequence held; waits for the device."""
        return int(self.count)

    @property
    def count(self) -> Int64[Tensor, ""]:
        """Tokens a sequence held, on the device."""
        return (self.coded + self.recent).squeeze(0)

    def tensors(self) -> list[Tensor]:
        """Every tensor held, shared coding tables included."""
        tables = self.code.tables(self.table.device)
        return self._own() + self.prefix.tensors() + tables

    def _own(self) -> list[Tensor]:
        own = [self.window_keys, self.window_values, self.table, self.spare, self.starts]
        return [*own, self.lengths, self.pages, self.coded, self.recent, *self.slab.pool]


def _padded(x: Tensor, tokens: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, 0, 0, tokens - x.shape[2]))
