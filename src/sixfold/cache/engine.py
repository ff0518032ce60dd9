"""An attention layer of a serving engine: ragged batches, in blocks of memory that it owns.

Whole pages lie as codes in the engine's blocks. The open page of a running sequence, up to 64
tokens, stays in the model's dtype in a row of memory of the layer's; it is encoded once, when full.
Which block and which row is whose is the engine's business.
"""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from sixfold.arguments import FLOATS, shown, whole
from sixfold.cache.affine import QueryEnergy, estimate_key_map
from sixfold.cache.code import Softmax, codebook_code
from sixfold.cache.key_maps import check_pinned, shared
from sixfold.cache.policy import CachePolicy
from sixfold.cache.step import Part, Step
from sixfold.errors import ShapeError, SixfoldError
from sixfold.kernels._autocast import outside_autocast
from sixfold.kernels._groups import check_heads
from sixfold.kernels.attention import exact_attention
from sixfold.kernels.types import KeyMap, Pool, Tokens
from sixfold.packing import PAGE_TOKENS

SCALE_BYTES = PAGE_TOKENS * 2


class EngineLayer:
    """One attention layer of a serving engine.

    The key map is one for all sequences: given, or fitted to the raw tokens in hand when the first
    page is encoded (docs/key_map.md says how little it depends on the text).

    Attributes:
        policy: How keys and values are coded. Sinks and a window beyond the open page are not kept.
        key_map: Of all sequences; None until a page is full.
        open_keys: Keys of the open pages.
        open_values: Values of the open pages.
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
        sliding_window: int | None = None,
        key_map: KeyMap | None = None,
    ) -> None:
        """A layer with `rows` open pages: one for every sequence that may run at once.

        Args:
            policy: How keys and values are coded.
            kv_heads: KV heads.
            key_dim: Dimension of a key.
            value_dim: Dimension of a value.
            rows: Open pages.
            dtype: The model's.
            device: Where the engine's blocks are.
            sliding_window: Tokens a query sees, itself included; None for all.
            key_map: A map to use from the first page on, such as `KeyMaps.load(path)[layer]`.

        Raises:
            SixfoldError: `policy` or `key_map` is none.
            ShapeError: The map is for other keys.
        """
        if not isinstance(policy, CachePolicy):
            raise SixfoldError(f"policy must be a CachePolicy, got {shown(policy)}")
        if key_map is not None:
            check_pinned(key_map, kv_heads, key_dim)
            key_map = key_map.to(device)
        if sliding_window is not None:
            sliding_window = whole("sliding_window", sliding_window, 1)
        if dtype not in FLOATS:
            raise SixfoldError(f"dtype must be one of {FLOATS}, got {shown(dtype)}")
        self.policy, self.sliding_window, self.key_map = policy, sliding_window, key_map
        self.code = codebook_code(policy, key_dim, value_dim)
        with torch.inference_mode(False):
            self.open_keys, self.open_values = (
                torch.zeros(rows, kv_heads, PAGE_TOKENS, dim, dtype=dtype, device=device)
                for dim in (key_dim, value_dim)
            )
        self._energy: QueryEnergy | None = None

    @property
    def block_bytes(self) -> int:
        """Bytes of one head's page in a block: key codes and scales, value codes and scales."""
        return sum(self.code.page_bytes) + 2 * SCALE_BYTES

    def pool(self, blocks: UInt8[Tensor, "slots kv_heads block_bytes"]) -> Pool:
        """An engine's blocks, at any distance from each other, as a pool.

        Raises:
            ShapeError: The blocks are for other heads or widths.
        """
        expected = self.open_keys.shape[1], self.block_bytes
        if blocks.dtype is not torch.uint8 or blocks.ndim != 3 or blocks.shape[1:] != expected:
            raise ShapeError(
                f"blocks: expected uint8 [slots, {expected[0]}, {expected[1]}], got "
                f"{blocks.dtype} {list(blocks.shape)}."
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
    ) -> Float[Tensor, "tokens heads value_dim"]:
        """Causal attention of new tokens over their own sequences; then they are stored.

        Args:
            query: Queries of all new tokens, sequence by sequence.
            keys: Their keys.
            values: Their values.
            pool: The engine's blocks, as `pool` makes it.
            step: Whose tokens they are.
            scaling: Factor of the logits.
            softcap: Logits become ``softcap·tanh(logit/softcap)``.
            sink_logits: A learned logit a head without a value (GPT-OSS).

        Raises:
            ShapeError: There are not as many tokens as the step has, or tensors do not fit.
        """
        self._check(query, keys, values, pool, step)
        self._observe(query)
        softmax = Softmax(scaling, None, self.sliding_window, softcap, sink_logits)
        parts = [part for part in (step.single, *step.several) if part.batch]
        new = [(part.take(keys), part.take(values)) for part in parts]
        out = query.new_empty(*query.shape[:2], values.shape[2])
        for part, vectors in zip(parts, new, strict=True):
            found = self._attend_part(part.take(query), *vectors, pool, part, softmax)
            part.put(out, found.transpose(1, 2).flatten(0, 1))
        # Until here a step can be repeated: nothing was written but what it writes again.
        rest = [self._encode(*x, pool, part) for part, x in zip(parts, new, strict=True)]
        for part, left in zip(parts, rest, strict=True):
            self._keep(part, *left)
        return out

    def _attend_part(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        pool: Pool,
        part: Part,
        softmax: Softmax,
    ) -> Tensor:
        if part.new == 1:
            offset = part.position - part.first
            self.open_keys[part.rows, :, offset] = keys[:, :, 0]
            self.open_values[part.rows, :, offset] = values[:, :, 0]
            window = part.open_page(self.open_keys, self.open_values, 1)
            return self._attention(query, [window], pool, part, softmax)
        (context,) = part.context
        if context == 0:
            return exact_attention(query, keys, values, **vars(softmax))
        own = Tokens(keys, values, part.position, part.position)
        before = [part.open_page(self.open_keys, self.open_values, 0)]
        return self._attention(query, [*before, own], pool, part, softmax)

    def _encode(self, keys: Tensor, values: Tensor, pool: Pool, part: Part) -> tuple[Tensor, ...]:
        """Encode the pages that new tokens fill; returns what of a chunk is left over."""
        if part.new == 1:
            if len(part.full):
                rows, page = part.rows[part.full], part.first[part.full] // PAGE_TOKENS
                slots = part.slots[part.full].gather(1, page[:, None])
                self._store(self.open_keys[rows], self.open_values[rows], slots, pool)
            return ()
        (context,), rows = part.context, part.rows
        first, held = divmod(context, PAGE_TOKENS)
        # Of both: what was open before, and what is new.
        raw = [
            torch.cat([old[rows, :, :held], fresh], 2)
            for old, fresh in ((self.open_keys, keys), (self.open_values, values))
        ]
        pages = (held + part.new) // PAGE_TOKENS
        if pages:
            full_keys, full_values = (x[:, :, : pages * PAGE_TOKENS] for x in raw)
            self._store(full_keys, full_values, part.slots[:, first : first + pages], pool)
        return tuple(x[:, :, pages * PAGE_TOKENS :] for x in raw)

    def _keep(self, part: Part, *rest: Tensor) -> None:
        """Open a page with what is left over."""
        for target, x in zip((self.open_keys, self.open_values), rest, strict=False):
            target[part.rows, :, : x.shape[2]] = x

    def _check(self, query: Tensor, keys: Tensor, values: Tensor, pool: Pool, step: Step) -> None:
        """Refuse what does not fit, before anything is read or written."""
        tokens, kv_heads, dtype = sum(step.new), self.open_keys.shape[1], self.open_keys.dtype
        for name, x, heads, dim in (
            ("query", query, query.shape[1] if query.ndim == 3 else 0, self.open_keys.shape[3]),
            ("keys", keys, kv_heads, self.open_keys.shape[3]),
            ("values", values, kv_heads, self.open_values.shape[3]),
        ):
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
        step.check(len(pool.key_codes), len(self.open_keys))

    def _attention(
        self, query: Tensor, tokens: list[Tokens], pool: Pool, part: Part, softmax: Softmax
    ) -> Tensor:
        # Before there is a map no page is coded: one that changes nothing stands in.
        key_map = self.key_map or self._identity()
        return self.code.attend(
            query,
            tokens,
            part.pages(pool),
            shared(key_map, part.batch),
            part.position,
            torch.zeros_like(part.position),
            softmax,
        )

    def _store(self, keys: Tensor, values: Tensor, slots: Tensor, pool: Pool) -> None:
        """Encode whole pages [sequences, kv_heads, pages·64, dim] of raw tokens."""
        if self.key_map is None:
            self.key_map = self._fitted(keys)
            self._energy = None
        self.code.store(keys, values, slots, pool, shared(self.key_map, len(keys)))

    def _observe(self, query: Tensor) -> None:
        if self.key_map is None:
            kv_heads = self.open_keys.shape[1]
            energy = QueryEnergy.observe(query.transpose(0, 1)[None], None, kv_heads)
            self._energy = energy if self._energy is None else self._energy + energy

    def _fitted(self, keys: Tensor) -> KeyMap:
        """One map, fitted to all raw keys in hand."""
        together = keys.transpose(0, 1).flatten(1, 2)[None]
        seen = torch.ones(1, together.shape[2], dtype=torch.bool, device=keys.device)
        center, equalize = self.policy.center_keys, self.policy.equalize_keys
        return estimate_key_map(together, seen, self._energy, center=center, equalize=equalize)

    def _identity(self) -> KeyMap:
        zero = self.open_keys.new_zeros(1, *self.open_keys.shape[1::2], dtype=torch.float32)
        return KeyMap(zero, zero + 1)
