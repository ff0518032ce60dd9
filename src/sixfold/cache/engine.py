"""An attention layer of a serving engine: ragged batches, in blocks of memory that it owns.

Whole pages lie as codes in the engine's blocks. The open page of a running sequence, up to 64
tokens, stays in the model's dtype in a row of memory of the layer's; it is encoded when it is full.
Attention sinks, and the last full page, may be kept there as well. Which block and which row is
whose is the engine's business.
"""

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from sixfold._surroundings import ordinary_tensors, outside_autocast
from sixfold.arguments import MOST_COORDINATES, dense, float_dtype, floating, shown, whole
from sixfold.arguments import device as checked_device
from sixfold.cache.code import Code, page_code
from sixfold.cache.fill import Fill
from sixfold.cache.key_maps import check_pinned, shared
from sixfold.cache.learning import ENOUGH, Learning
from sixfold.cache.policy import CachePolicy
from sixfold.cache.step import Part, Step
from sixfold.errors import ShapeError, SixfoldError
from sixfold.kernels._groups import check_heads
from sixfold.kernels.attention import exact_attention
from sixfold.kernels.types import KeyMap, Past, Pool, Softmax, Tokens
from sixfold.packing import PAGE_TOKENS

SCALE_BYTES = PAGE_TOKENS * 2


@runtime_checkable
class AttendChunks(Protocol):
    """Attention of the sequences of a step that have several new tokens."""

    def __call__(
        self,
        layer: "EngineLayer",
        query: Float[Tensor, "tokens heads key_dim"],
        keys: Float[Tensor, "tokens kv_heads key_dim"],
        values: Float[Tensor, "tokens kv_heads value_dim"],
        pool: Pool,
        step: Step,
        softmax: Softmax,
        out: Float[Tensor, "tokens heads value_dim"],
    ) -> None:
        """Write theirs to `out`, causal. What of their pages is kept raw is in the layer's rows."""


def attend_chunks(
    layer: "EngineLayer",
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    pool: Pool,
    step: Step,
    softmax: Softmax,
    out: Tensor,
) -> None:
    """Sequence by sequence, on the codes. See `AttendChunks`."""
    for part in step.several:
        attend_part(layer, query, keys, values, pool, part, softmax, out)


def attend_part(
    layer: "EngineLayer",
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    pool: Pool,
    part: Part,
    softmax: Softmax,
    out: Tensor,
) -> None:
    """One sequence, on the codes. See `AttendChunks`."""
    own_query, own_keys, own_values = (part.take(x) for x in (query, keys, values))
    if part.context == [0]:
        found = exact_attention(own_query, own_keys, own_values, **softmax._asdict())
    else:
        new = Tokens(own_keys, own_values, part.position, part.position)
        found = layer.attention(own_query, [*layer.raw(part, 0), new], pool, part, softmax)
    part.put(out, found.transpose(1, 2).flatten(0, 1))


def page_nbytes(code: Code) -> int:
    """Bytes of one head's page in a block: key codes and scales, value codes and scales."""
    return sum(code.page_bytes) + 2 * SCALE_BYTES


def _check_out(out: Tensor, query: Tensor, values: Tensor) -> None:
    dense("out", out)
    expected = *query.shape[:2], values.shape[2]
    if out.shape != expected or (out.dtype, out.device) != (query.dtype, query.device):
        raise ShapeError(
            f"out: expected {query.dtype} {list(expected)} on {query.device}, got {out.dtype} "
            f"{list(out.shape)} on {out.device}."
        )


class EngineLayer:
    """One attention layer of a serving engine.

    The key map is one for all sequences: given, or fitted to the first pages and again until
    1,024 tokens were seen (docs/key_map.md says how little it depends on the text).

    Attributes:
        policy: How keys and values are coded. Of its windows only `sink_tokens` counts: which other
            tokens are kept raw is what rows the engine gives them.
        key_map: Of all sequences; None until a page is full.
        copies: Keys and values of the pages that are kept raw, [rows, kv_heads, 64, dim].
        sinks: Keys and values of first tokens, [sink_rows, kv_heads, sink_tokens, dim].
    """

    def __init__(
        self,
        policy: CachePolicy,
        kv_heads: int,
        key_dim: int,
        value_dim: int,
        rows: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        sink_rows: int = 0,
        sliding_window: int | None = None,
        key_map: KeyMap | None = None,
        refit: bool = True,
    ) -> None:
        """A layer that keeps `rows` pages raw: one or two for every sequence that runs at once.

        Args:
            policy: How keys and values are coded.
            kv_heads: KV heads.
            key_dim: Dimension of a key.
            value_dim: Dimension of a value.
            rows: Pages kept raw.
            dtype: The model's.
            device: Where the engine's blocks are.
            sink_rows: Sequences whose first `policy.sink_tokens` tokens are kept raw.
            sliding_window: Tokens a query sees, itself included; None for all.
            key_map: A map to use from the first page on, such as `KeyMaps.load(path)[layer]`.
            refit: Whether coded pages may be encoded again, by a map that is fitted to more: not
                where others write to their blocks and `forget` is not called.

        Raises:
            SixfoldError: `policy` or `key_map` is none.
            ShapeError: The map is for other keys.
        """
        if not isinstance(policy, CachePolicy):
            raise SixfoldError(f"policy must be a CachePolicy, got {shown(policy)}")
        kv_heads, key_dim, value_dim = (
            whole(name, x, 1, MOST_COORDINATES)
            for name, x in (("kv_heads", kv_heads), ("key_dim", key_dim), ("value_dim", value_dim))
        )
        rows, sink_rows = whole("rows", rows), whole("sink_rows", sink_rows)
        device = checked_device(device)
        if key_map is not None:
            check_pinned(key_map, kv_heads, key_dim)
            key_map = key_map.to(device)
        if sliding_window is not None:
            sliding_window = whole("sliding_window", sliding_window, 1)
        dtype = float_dtype(dtype)
        self.policy, self.sliding_window, self.key_map = policy, sliding_window, key_map
        self.code = page_code(policy, key_dim, value_dim)
        with ordinary_tensors():
            self.copies, self.sinks = (
                (
                    # The system gives memory that is only reserved when it is written to. What was
                    # not written is never read but hidden.
                    torch.empty(count, kv_heads, tokens, key_dim, dtype=dtype, device=device),
                    torch.empty(count, kv_heads, tokens, value_dim, dtype=dtype, device=device),
                )
                for count, tokens in ((rows, PAGE_TOKENS), (sink_rows, policy.sink_tokens))
            )
        self._learning = (
            None if key_map is not None else Learning(policy, kv_heads, ENOUGH if refit else 1)
        )

    @property
    def block_bytes(self) -> int:
        """See `page_nbytes`."""
        return page_nbytes(self.code)

    def pool(self, blocks: UInt8[Tensor, "slots kv_heads block_bytes"]) -> Pool:
        """An engine's blocks, at any distance from each other, as a pool.

        Raises:
            ShapeError: The blocks are for other heads or widths.
        """
        dense("blocks", blocks)
        expected = self.copies[0].shape[1], self.block_bytes
        fits = blocks.ndim == 3 and blocks.shape[1:] == expected and blocks.stride(2) == 1
        if blocks.dtype is not torch.uint8 or not fits:
            raise ShapeError(
                f"blocks: expected uint8 [slots, {expected[0]}, {expected[1]}], the last dimension "
                f"contiguous, got {blocks.dtype} {list(blocks.shape)} of stride {blocks.stride()}."
            )
        key_bytes, value_bytes = self.code.page_bytes
        sizes = [key_bytes, SCALE_BYTES, value_bytes, SCALE_BYTES]
        keys, key_scales, values, value_scales = blocks.split(sizes, 2)
        half = torch.float16
        return Pool(keys, key_scales.view(half), values, value_scales.view(half))

    @outside_autocast
    @torch.no_grad()
    def attend(
        self,
        query: Float[Tensor, "tokens heads key_dim"],
        keys: Float[Tensor, "tokens kv_heads key_dim"],
        values: Float[Tensor, "tokens kv_heads value_dim"],
        pool: Pool,
        step: Step,
        *,
        scaling: float,
        softcap: float | None = None,
        sink_logits: Float[Tensor, " heads"] | None = None,
        chunks: AttendChunks | None = None,
        out: Float[Tensor, "tokens heads value_dim"] | None = None,
    ) -> Float[Tensor, "tokens heads value_dim"]:
        """Store new tokens, and attend with them, each over its own sequence and causally.

        Args:
            query: Queries of all new tokens, sequence by sequence.
            keys: Their keys.
            values: Their values.
            pool: The engine's blocks, as `pool` makes it.
            step: Whose tokens they are.
            scaling: Factor of the logits.
            softcap: Logits become ``softcap·tanh(logit/softcap)``.
            sink_logits: A learned logit a head without a value (GPT-OSS).
            chunks: What attends for sequences with several new tokens; `attend_chunks` without.
            out: Memory for the output; new without.

        Returns:
            The output of all new tokens, `out` if that is given.

        Raises:
            ShapeError: There are not as many tokens as the step has, or tensors do not fit.
            SixfoldError: There are coded tokens and no map that they were coded with.
        """
        self._check(query, keys, values, pool, step)
        if out is None:
            out = query.new_empty(*query.shape[:2], values.shape[2])
        _check_out(out, query, values)
        if self._learning is not None:
            self._learning.observe(query, begins=not any(step.context))
        softmax = Softmax(scaling, None, self.sliding_window, softcap, sink_logits)
        # All is stored first: a sequence may begin with blocks that another fills in this step.
        # What is written changes no token, and is written again if the step is repeated.
        for i, x in enumerate((keys, values)):
            step.fill.raw.put(self.copies[i], x)
            step.fill.sinks.put(self.sinks[i], x)
        self._encode(keys, values, pool, step.fill)
        if step.single.batch:
            one, raw = step.single.take(query), self.raw(step.single, 1)
            found = self.attention(one, raw, pool, step.single, softmax)
            step.single.put(out, found.transpose(1, 2).flatten(0, 1))
        if step.chunked:
            (chunks or attend_chunks)(self, query, keys, values, pool, step, softmax, out)
        return out

    def raw(self, part: Part, more: int) -> list[Tokens]:
        """See `Part.raw`."""
        return part.raw(self.copies, self.sinks, more)

    def attention(
        self, query: Tensor, tokens: list[Tokens], pool: Pool, part: Part, softmax: Softmax
    ) -> Tensor:
        """Attention of a part's queries over the pages that are coded, and these tokens.

        Args:
            query: Theirs, [batch, heads, new, key_dim].
            tokens: What is in full precision.
            pool: The engine's blocks.
            part: Whose queries they are.
            softmax: What makes weights of logits.

        Returns:
            The output, [batch, heads, new, value_dim].
        """
        # Before there is a map no page is coded: one that changes nothing stands in.
        key_map = self.key_map or self._identity()
        return self.code.attend(
            query,
            tokens,
            Past.of(part.pages(pool), shared(key_map, part.batch), part.start),
            part.position,
            softmax,
        )

    @property
    def learning(self) -> bool:
        """Whether the key map may change yet, and codes in blocks with it."""
        return self._learning is not None

    def forget(self, blocks: Iterable[int]) -> None:
        """Blocks that others have written to: they hold no pages of this layer any more.

        Only an engine that lends one memory to several layers in turn need say so: what the layer
        itself writes over it knows. A block that others hold, and have not written to, the layer
        may encode an old page in.
        """
        if self._learning is not None:
            self._learning.forget(blocks)

    def settle(self) -> None:
        """Keep the map of now, or else the first: codes in blocks do not change any more."""
        if self.key_map is not None:
            self._learning = None
        elif self._learning is not None:
            self._learning = Learning(self.policy, self.copies[0].shape[1], 1)

    def _encode(self, keys: Tensor, values: Tensor, pool: Pool, fill: Fill) -> None:
        """Encode all pages that are full."""
        full_keys, full_values = (
            list(fill.filled(old, x)) for old, x in zip(self.copies, (keys, values), strict=True)
        )
        new_keys, new_values = ([x for x, _ in full] for full in (full_keys, full_values))
        learning = self._learning
        if learning is not None:
            self._learn(learning, new_keys, pool, fill)
        for (own_keys, slots), (own_values, _) in zip(full_keys, full_values, strict=True):
            self._store(own_keys, own_values, slots, pool)
        if learning is not None and full_keys:
            learning.count(len(fill.beginning))
            if learning.done:
                self._learning = None
            else:
                learning.keep(fill.blocks, new_keys, new_values, fill.beginning)

    def _store(self, keys: Tensor, values: Tensor, slots: Tensor, pool: Pool) -> None:
        assert self.key_map is not None
        self.code.store(keys, values, slots, pool, shared(self.key_map, len(slots)))

    def _learn(self, learning: Learning, keys: list[Tensor], pool: Pool, fill: Fill) -> None:
        """Another map, if these pages make one due, and the codes by it of those before."""
        fitted = learning.fit(keys, fill.beginning) if keys else None
        if fitted is not None:
            self.key_map, learning.stale = fitted, True
        # Of a map of before as well, if its step failed here.
        if learning.stale and (coded := learning.coded()) is not None:
            self._store(*coded, pool)
        learning.stale = False

    def _check(self, query: Tensor, keys: Tensor, values: Tensor, pool: Pool, step: Step) -> None:
        """Refuse what does not fit, before anything is read or written."""
        if not isinstance(step, Step) or not isinstance(pool, Pool):
            raise SixfoldError(
                f"expected a Pool and a Step, got {shown(type(pool))} and {shown(type(step))}"
            )
        tokens, (own_keys, own_values) = sum(step.new), self.copies
        kv_heads, dtype = own_keys.shape[1], own_keys.dtype
        for name, x, heads, dim in (
            ("query", query, 0, own_keys.shape[3]),
            ("keys", keys, kv_heads, own_keys.shape[3]),
            ("values", values, kv_heads, own_values.shape[3]),
        ):
            floating(name, x)
            heads = heads or (x.shape[1] if x.ndim == 3 else 0)
            if x.shape != (tokens, heads, dim) or x.dtype is not dtype:
                raise ShapeError(
                    f"{name}: expected the {tokens} new tokens of the step, {dtype} "
                    f"[{tokens}, {heads or 'heads'}, {dim}], got {x.dtype} {list(x.shape)}."
                )
        check_heads(query.shape[1], kv_heads)
        expected = self.code.page_bytes
        if (pool.key_codes.shape[2], pool.value_codes.shape[2]) != expected:
            raise ShapeError(
                f"pool: expected pages of {expected} bytes of keys and of values, got "
                f"{[list(x.shape) for x in pool]}; make it with EngineLayer.pool."
            )
        if step.sinks is not None and step.sink_tokens != self.policy.sink_tokens:
            raise SixfoldError(
                f"expected a step with the {self.policy.sink_tokens} sinks of the policy, got "
                f"{step.sink_tokens}."
            )
        step.check(len(pool.key_codes), len(own_keys), len(self.sinks[0]))
        coded = len(step.fill.beginning) > 0 or self.key_map is not None
        if not coded and max(step.context, default=0) >= PAGE_TOKENS:
            raise SixfoldError(
                f"expected sequences that this layer began, got {max(step.context)} tokens of "
                "context and nothing coded yet: pass the key_map that their pages were coded with"
            )

    def _identity(self) -> KeyMap:
        keys = self.copies[0]
        zero = keys.new_zeros(1, *keys.shape[1::2], dtype=torch.float32)
        return KeyMap(zero, zero + 1)
