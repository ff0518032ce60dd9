"""One attention layer's compressed history: append, attend, compress, and operations on codes."""

import copy
import dataclasses
from itertools import accumulate
from operator import is_
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sixfold._surroundings import outside_autocast, untraced
from sixfold.arguments import device as checked_device
from sixfold.arguments import float_dtype, floating, plain_floats, shown, whole
from sixfold.arguments import rows as checked_rows
from sixfold.cache.affine import (
    DEFAULT_FIT,
    MIN_TOKENS,
    KeyMapFit,
    QueryEnergy,
    leading_padding,
)
from sixfold.cache.code import Code, MakeCode, page_code
from sixfold.cache.dense import DenseTokens, check_same, check_tokens
from sixfold.cache.gradients import refuse_gradient
from sixfold.cache.key_maps import check_pinned, shared
from sixfold.cache.masks import check_mask, fit_mask, valid_tokens
from sixfold.cache.pages import PagedHistory
from sixfold.cache.policy import CachePolicy
from sixfold.cache.prefix import Prefix, fitted_map
from sixfold.errors import ShapeError, SixfoldError
from sixfold.kernels.attention import exact_attention
from sixfold.kernels.types import KeyMap, Mask, Past, Softmax, Tokens
from sixfold.packing import PAGE_TOKENS


class CompressedLayer:
    """Keys and values of one layer: sinks, pages of codes, and recent tokens.

    Tokens arrive by `append` in full precision and wait in the window. `attend` (or `dequantized`)
    reads everything held; `compress` turns what exceeds the recent window into pages of 64 tokens.
    Positions count from the oldest token still held. Window, prefix and runs are values, replaced
    and never changed in place, so that forks can share them; and all that an operation replaces
    changes in one step at its end, so that an interrupt leaves the layer as it was before or after.
    Codes keep lengths from 1e-26 to 1e29; longer vectors are cut to that, shorter ones become zero.

    Attributes:
        policy: What is kept and at how many bits.
        code: How pages are coded.
        fit: How key maps are fitted.
        sliding_window: Tokens a query sees, itself included; None for all.
        window: Tokens in the model's dtype that have not been compressed.
        history: Compressed tokens.
        prefix: Sinks and key map; None until the first page is written.
        pinned: The key map of all sequences; None to fit one to each.
        padding: Left-padding tokens of every sequence, as far as masks have shown any.
        observed: Whether masks of all tokens were seen; of others keys have to show the padding.
        evicted: Tokens forgotten because they left the sliding window.
        record_past: Keep tokens that left the window until the next `crop` (assisted generation).
        detached: Whether tokens held came with a graph that was not kept.
    """

    def __init__(
        self,
        keys: Float[Tensor, "batch kv_heads tokens key_dim"],
        values: Float[Tensor, "batch kv_heads tokens value_dim"],
        policy: CachePolicy,
        sliding_window: int | None = None,
        key_map: KeyMap | None = None,
        make_code: MakeCode = page_code,
        fit: KeyMapFit = DEFAULT_FIT,
    ) -> None:
        """An empty history for vectors shaped like `keys` and `values`, which are not stored.

        Args:
            keys: Keys.
            values: Values.
            policy: What is kept and at how many bits.
            sliding_window: Tokens a query sees, itself included; None for all.
            key_map: One map, without an index, for all sequences; fitted to each by default.
            make_code: How pages are coded, from the policy and the dimensions.
            fit: How key maps are fitted.

        Raises:
            ShapeError: The tensors, or the map, do not fit each other.
            SixfoldError: Another argument is none of its kind.
        """
        check_tokens(keys, values)
        if not isinstance(policy, CachePolicy):
            raise SixfoldError(f"policy must be a CachePolicy, got {shown(policy)}")
        if sliding_window is not None:
            sliding_window = whole("sliding_window", sliding_window, 1)
        if key_map is not None:
            check_pinned(key_map, keys.shape[1], keys.shape[3])
            key_map = key_map.to(keys.device)
        self.pinned = key_map
        self.policy = policy
        self.sliding_window = sliding_window
        self._make_code, self.fit = make_code, fit
        self.code = make_code(policy, keys.shape[3], values.shape[3])
        self.window = DenseTokens(keys, values).copy_slice(0, 0)
        self.history = PagedHistory(keys.shape[1], *self.code.page_bytes)
        self.prefix: Prefix | None = None
        self.padding = torch.zeros(keys.shape[0], dtype=torch.int64, device=keys.device)
        self.query_energy: QueryEnergy | None = None
        self.evicted = 0
        self.record_past = False
        self.detached = False
        self.observed = False
        self._known_past: Past | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Copies have pages of their own.
        return {**self.__dict__, "_known_past": None}

    @property
    def held(self) -> int:
        """Tokens a sequence that can still be attended."""
        return self.history.tokens + self.window.keys.shape[2]

    @property
    def visible(self) -> int:
        """Tokens held that the next token can see."""
        return self.held if self.sliding_window is None else min(self.held, self.sliding_window - 1)

    @property
    def length(self) -> int:
        """Tokens a sequence ever seen."""
        return self.evicted + self.held

    def append(
        self,
        keys: Float[Tensor, "batch kv_heads tokens key_dim"],
        values: Float[Tensor, "batch kv_heads tokens value_dim"],
    ) -> None:
        """Add tokens in full precision.

        Raises:
            ShapeError: Batch, heads, dims, dtype or device differ from the tokens held.
        """
        check_tokens(keys, values)
        self.extend(keys, values)

    def extend(
        self,
        keys: Float[Tensor, "batch kv_heads tokens key_dim"],
        values: Float[Tensor, "batch kv_heads tokens value_dim"],
    ) -> None:
        """`append` for callers who have called `check_tokens`.

        Raises:
            ShapeError: Batch, heads, dims, dtype or device differ from the tokens held.
        """
        if (keys.requires_grad or values.requires_grad) and not torch.is_grad_enabled():
            keys, values = keys.detach(), values.detach()
        new = DenseTokens(keys, values)
        check_same(self.window, new)
        # In memory of their own: what was given may be written to again.
        first = self.window.keys.shape[2] == 0
        self.window = new.copy_slice(0, new.tokens) if first else self.window.append(new)

    def take_back(self, count: int) -> None:
        """Undo an `append` of `count` tokens that have not been attended."""
        count = whole("count", count, 0, self.window.tokens)
        self.window = self.window.copy_slice(0, self.window.tokens - count)

    def attend(
        self,
        query: Float[Tensor, "batch heads queries key_dim"],
        *,
        scaling: float,
        mask: Mask | None = None,
        softcap: float | None = None,
        sink_logits: Float[Tensor, " heads"] | None = None,
    ) -> Float[Tensor, "batch heads queries value_dim"]:
        """Attention of the newest tokens' queries over everything held, then `compress`.

        Args:
            query: Queries of the last tokens appended, in any dtype.
            scaling: Factor of the logits.
            mask: Attended tokens, the last column the newest; tokens held beyond the first column
                are not attended. Causal (and sliding) without.
            softcap: Logits become ``softcap·tanh(logit/softcap)``.
            sink_logits: A learned logit a head without a value (GPT-OSS).

        Returns:
            The output in the dtype of `query`. While nothing is compressed it is exact.

        Raises:
            ShapeError: The mask is for another number of tokens than are held.
        """
        window, held = self.window, self.held
        _check_query(query, window.keys, held)
        given, dtype = query.dtype, window.keys.dtype
        query = query if given is dtype else query.to(dtype)
        if mask is not None:
            check_mask(mask, query, held, self.length, self.sliding_window)
            mask = fit_mask(mask, held)
        prefix = self.prefix
        if prefix is not None and prefix.assumed:
            prefix = prefix.settled(mask)
        if prefix is None:
            self.observe(query, mask)
            out = exact_attention(
                query,
                window.keys,
                window.values,
                scaling=scaling,
                mask=mask,
                sliding_window=self.sliding_window,
                softcap=softcap,
                sink_logits=sink_logits,
            )
        else:
            past = self._past(prefix)
            first = torch.full_like(past.start, self.history.tokens)
            out = self.code.attend(
                query,
                [Tokens(window.keys, window.values, first, past.start)],
                past,
                torch.full_like(first, held - query.shape[2]),
                Softmax(scaling, mask, self.sliding_window, softcap, sink_logits),
            )
        if prefix is not self.prefix:
            self._become(prefix=prefix)
        if self.detached and torch.is_grad_enabled():
            out = refuse_gradient(out)
        self.compress()
        return out if given is dtype else out.to(given)

    def _past(self, prefix: Prefix) -> Past:
        """What is held beside the window: the same until a page is written."""
        held = self.history.parts, prefix.key_map, prefix.end, prefix.part
        past = self._known_past
        if past is None or not all(map(is_, past, held)):
            past = self._known_past = Past.of(*held)
        return past

    @untraced
    @outside_autocast
    def dequantized(
        self,
    ) -> tuple[
        Float[Tensor, "batch kv_heads tokens key_dim"],
        Float[Tensor, "batch kv_heads tokens value_dim"],
    ]:
        """Every token held, decoded to the model's dtype: as large as the uncompressed layer."""
        keys, values = self._decoded()
        if self.detached and torch.is_grad_enabled():
            return refuse_gradient(keys), refuse_gradient(values)
        return keys, values

    def _decoded(self) -> tuple[Tensor, Tensor]:
        if self.prefix is None:
            # Nothing is decoded: whoever writes to it must not write to what is held.
            return self.window.keys.clone(), self.window.values.clone()
        dtype, key_map = self.window.keys.dtype, self.prefix.key_map
        read = [
            run.valid(self.code.read(part, dtype, key_map))
            for run, part in zip(self.history.runs, self.history.parts, strict=True)
        ]
        all_keys = torch.cat([*(keys for keys, _ in read), self.window.keys], 2)
        all_values = torch.cat([*(values for _, values in read), self.window.values], 2)
        self.prefix.overwrite(all_keys, self.prefix.sinks.keys)
        self.prefix.overwrite(all_values, self.prefix.sinks.values)
        return all_keys, all_values

    def compress(self, now: bool = False) -> None:
        """Turn all but the recent window into codes, whole pages at a time.

        What is held afterwards has no history for autograd.

        Args:
            now: Also where so few tokens have been seen that the policy would wait for others to
                fit a key map to.
        """
        self.detached |= self.window.keys.requires_grad or self.window.values.requires_grad
        if not self.record_past and self.sliding_window is not None:
            self._evict()
        pages = (self.window.keys.shape[2] - self.policy.recent_window) // PAGE_TOKENS
        if pages > 0 and self._can_fix_prefix(now):
            self._compress(pages)
        else:
            if self.window.room is None:
                self.window = self.window.owned()

    @untraced
    @outside_autocast
    @torch.no_grad()
    def _compress(self, pages: int) -> None:
        prefix = self.prefix or self._fixed_prefix()
        runs = self.history.reserve(len(self.padding), pages, self.padding.device)
        for run, stop in zip(runs, accumulate(run.tokens for run in runs), strict=True):
            part = self.window.slice(stop - run.tokens, stop)
            self.code.store(part.keys, part.values, run.slots, run.slab.pool, prefix.key_map)
        rest = self.window.copy_slice(pages * PAGE_TOKENS, self.window.tokens)
        history = copy.copy(self.history)
        for run in runs:
            history.push(run)
        # Its tables at hand from now on, and counted as held.
        code = self.code.on(self.padding.device)
        self._become(
            window=rest.unmasked(), history=history, prefix=prefix, query_energy=None, code=code
        )

    def _become(self, **held: Any) -> None:
        """Hold these values instead, all of them in one step, which nothing can interrupt."""
        self.__dict__.update(held, _known_past=None)

    def crop(self, count: int) -> None:
        """Forget the last `count` tokens; codes that stay are not touched.

        Raises:
            SixfoldError: A sliding window has already forgotten tokens the remaining ones need.
        """
        count = whole("count", count)
        self.check_crop(count)
        if count >= self.length:
            self.reset()
            return
        remaining = max(self.held - count, 0)
        left, history = copy.copy(self), copy.copy(self.history)
        history.keep_first(remaining)
        left.window = self.window.copy_slice(0, max(remaining - self.history.tokens, 0))
        left.history = history
        left.padding = self.padding.clamp(max=self.evicted + remaining)
        left.prefix = self.prefix and self.prefix.crop(remaining)
        left._evict()
        self._become(**left.__dict__)

    def check_crop(self, count: int) -> None:
        """Refuse what `crop` would; changes nothing.

        Raises:
            SixfoldError: A sliding window has already forgotten tokens the remaining ones need.
        """
        remaining = max(self.held - count, 0)
        needed = min(max(self.length - count, 0), (self.sliding_window or 1) - 1)
        if self.evicted and remaining < needed:
            raise SixfoldError(
                f"cannot remove {count} tokens: the sliding window of {self.sliding_window} tokens "
                f"has let go of {needed - remaining} tokens that would be visible again; call "
                "cache.activate_past_recording() before generating tokens that may be removed."
            )

    def reset(self) -> None:
        """Forget every token, and with them the sinks and a key map that was fitted to them."""
        history = copy.copy(self.history)
        history.keep_first(0)
        self._become(
            window=self.window.copy_slice(0, 0),
            history=history,
            padding=torch.zeros_like(self.padding),
            prefix=None,
            query_energy=None,
            evicted=0,
            detached=False,
            observed=False,
            code=self._new_code(),
        )

    def select(self, rows: Int[Tensor, " rows"]) -> None:
        """Keep, repeat or reorder sequences of the batch: codes are shared, not copied.

        Raises:
            SixfoldError: `rows` are no numbers of sequences, nor a mask over all of them.
            OutOfRangeError: There is no such sequence.
        """
        rows = checked_rows("rows", rows, len(self.padding)).to(self.padding.device)
        energy, history = self.query_energy, copy.copy(self.history)
        history.select(rows)
        shrinks = len(rows) < len(self.padding)
        self._become(
            window=self.window.select(rows),
            history=history,
            padding=self.padding[rows],
            prefix=self.prefix and self.prefix.select(rows),
            query_energy=energy and QueryEnergy(energy.squares[rows]),
        )
        if shrinks:
            # Now that nobody but forks holds the pages of the others.
            history = copy.copy(history)
            history.compact()
            self._become(history=history)

    def fork(self) -> "CompressedLayer":
        """A second history that starts from this one's tokens and shares its pages.

        Different forks may be used in different threads at the same time, one of them by one only.
        """
        twin = copy.copy(self)
        twin.history = self.history.fork()
        return twin

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """Move everything held, or nothing where there is no room for all of it.

        Args:
            device: Where to.
            dtype: Of tokens that are not compressed; as it is by default.
        """
        device = checked_device(device)
        if dtype is not None:
            dtype = float_dtype(dtype)
        moved = self.fork()
        moved.window, moved.padding = self.window.to(device, dtype), self.padding.to(device)
        if self.query_energy is not None:
            moved.query_energy = QueryEnergy(self.query_energy.squares.to(device))
        if self.pinned is not None:
            moved.pinned = self.pinned.to(device)
        if self.prefix is not None:
            moved.prefix = self.prefix.to(device, dtype)
            if self.pinned and moved.pinned and self.prefix.key_map.mean is self.pinned.mean:
                # One copy of it there, too.
                key_map = shared(moved.pinned, len(moved.padding))
                moved.prefix = dataclasses.replace(moved.prefix, key_map=key_map)
        moved.history.to(device)
        moved.code = self._new_code()
        self._become(**moved.__dict__)

    def tensors(self) -> list[Tensor]:
        """Every tensor held, shared coding tables included."""
        held = [*self.window.tensors(), self.padding]
        if self.query_energy is not None:
            held.append(self.query_energy.squares)
        if self.pinned is not None:
            held += self.pinned.tensors()
        if self.prefix is not None:
            held += self.prefix.tensors()
            held += self.code.tables(self.padding.device)
        return held + self.history.tensors()

    def _new_code(self) -> Code:
        window = self.window
        return self._make_code(self.policy, window.keys.shape[3], window.values.shape[3])

    @outside_autocast
    @torch.no_grad()
    def observe(
        self,
        query: Float[Tensor, "batch heads queries key_dim"],
        mask: Mask | None = None,
        shown: bool = True,
    ) -> None:
        """Until codes exist: count left padding and the energy of the queries.

        Args:
            query: Queries of the last tokens appended.
            mask: Attended tokens, the last column the newest; all of them without.
            shown: Whether that is known; otherwise keys have to show the padding.
        """
        batch, _, queries, _ = query.shape
        if shown:
            self.observed |= queries == self.length
            valid = valid_tokens(mask, queries, batch)
            if valid is not None:
                before = self.length - queries
                self.window = self.window.masked(valid)
                leading = (valid.cumsum(1) == 0).sum(1)
                self.padding = torch.where(self.padding == before, before + leading, self.padding)
        else:
            places = torch.arange(-queries, 0, device=query.device) + self.window.tokens
            valid = places >= leading_padding(self.window.keys)[:, None]
        if self.pinned is not None:
            return
        energy = self.fit.observe(query, valid, self.window.keys.shape[1])
        self.query_energy = energy if self.query_energy is None else self.query_energy + energy

    @property
    def _sinks(self) -> int:
        return self.policy.sink_tokens if self.sliding_window is None else 0

    def _can_fix_prefix(self, now: bool) -> bool:
        """Whether every sequence that has begun has shown the tokens that its key map needs.

        The longest decides whether there are as many as the policy asks for: a short one of the
        batch must not hold up the others.
        """
        if self.prefix is not None:
            return True
        waits = self.pinned is None and not now
        # Asked in every step until there are enough: without a word from the device.
        if waits and self.length < self.policy.least_tokens:
            return False
        seen = self.length - self.padding
        # A row that is all padding may stay so: it must not hold up the others.
        begun = seen[seen > 0]
        if len(begun) == 0:
            return False
        needed = self._sinks + (MIN_TOKENS if self.pinned is None else 0)
        enough = int(begun.min()) >= needed
        return enough and not (waits and int(begun.max()) < self.policy.least_tokens)

    def _fixed_prefix(self) -> Prefix:
        padding = (self.padding - self.evicted).clamp(min=0)
        assumed = not self.observed
        if assumed:
            padding = torch.maximum(padding, leading_padding(self.window.keys))
        if self.pinned is None:
            seen = self.window, padding, self.query_energy
            key_map = fitted_map(*seen, self.policy, self._sinks, self.fit)
        else:
            key_map = shared(self.pinned, len(padding))
        return Prefix.fix(self.window, padding, key_map, self._sinks, assumed)

    def _evict(self) -> None:
        """Let go of tokens that no later query can see: whole pages, then single tokens."""
        if self.sliding_window is None:
            return
        expired = self.held - self.visible
        if expired == 0:
            return
        window, history = self.window, copy.copy(self.history)
        gone = history.drop_first(expired)
        if history.tokens == 0 and expired > gone:
            window = window.without_first(expired - gone)
            gone = expired
        if gone == 0:
            return
        self._become(
            window=window,
            history=history,
            prefix=self.prefix and self.prefix.evict(gone),
            evicted=self.evicted + gone,
        )


def _check_query(query: Any, keys: Tensor, held: int) -> None:
    """Refuse what is no query of the newest of `held` tokens, whose last ones have `keys`.

    Raises:
        SixfoldError: It is no dense tensor of a floating dtype, or on another device.
        ShapeError: It is for another batch, other heads or more tokens.
    """
    batch, heads, _, dim = keys.shape
    if not plain_floats(query):
        floating("query", query)
    shape = query.shape
    fits = len(shape) == 4 and shape[0] == batch and shape[3] == dim
    if not fits or shape[1] % heads or not 0 < shape[2] <= held:
        raise ShapeError(
            f"query: expected [{batch}, a multiple of {heads} heads, 1 to {held} tokens, "
            f"{dim}], got {list(query.shape)}."
        )
    if query.device != keys.device:
        raise SixfoldError(f"query is on {query.device}, this layer on {keys.device}: move it.")
