"""Prompts, attended by vLLM's own kernel on a scratch cache that lives for one call."""

from dataclasses import dataclass
from itertools import accumulate
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from sixfold.cache.engine import AttendChunks, EngineLayer, attend_part
from sixfold.cache.step import Part, Step
from sixfold.kernels.types import KeyMap, Pages, Pool, Softmax
from sixfold.packing import PAGE_TOKENS

BLOCK = PAGE_TOKENS
# Scratch of one call, unless one request alone needs more.
MOST_TOKENS = 16_384
# From so many new tokens on it is faster to decode the context once and attend it uncompressed than
# to attend the codes (docs/vllm.md). What vLLM's kernel runs on decides.
WORTH_DECODING = {"amx": 64}
OTHERWISE = 256


@dataclass(frozen=True)
class Group:
    """Requests whose prompts are one call.

    Attributes:
        tokens: Where their new tokens are among all of the step: a slice where they lie together.
        pages: Blocks of their coded context, each once.
        rows: Of every token of their context that is read raw, its row.
        offsets: And its place there.
        sinks: Which of the coded tokens are read raw, too, and where: row and place there.
        places: Where in the scratch coded, raw and new tokens go.
        starts: Where each request's new tokens start among theirs, and the end.
        lengths: Tokens of each in the scratch.
        table: The scratch blocks of each.
        schedule: How vLLM's kernel divides the work.
        blocks: Scratch blocks in all.
    """

    tokens: slice | Tensor
    pages: Tensor
    rows: Tensor
    offsets: Tensor
    sinks: tuple[Tensor, Tensor, Tensor]
    places: tuple[Tensor, Tensor, Tensor]
    starts: Tensor
    lengths: Tensor
    table: Tensor
    schedule: Tensor
    blocks: int


class Scratch:
    """Makes the attention of prompts for layers of one shape, and holds the memory it needs."""

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        dim: int,
        dtype: torch.dtype,
        *,
        windows: set[int | None],
    ) -> None:
        """For layers of so many heads, with these sliding windows."""
        self.heads, self.kv_heads, self.dim, self.dtype = heads, kv_heads, dim, dtype
        # Where layers differ, each masks for itself, and nothing is left out.
        self.window = next(iter(windows)) if len(windows) == 1 else None
        self.isa = _get_attn_isa(dtype, BLOCK, dim)
        self._memory = torch.zeros(0, kv_heads, 2 * BLOCK, dim, dtype=dtype)

    def plan(self, step: Step) -> AttendChunks:
        """What attends the prompts of a step."""
        decoded, coded = self._sorted(step)
        groups = self._groups(step, decoded)
        alike: dict[int, list[int]] = {}
        for b in coded:
            alike.setdefault(step.new[b], []).append(b)
        parts = [Part.of(step, which) for which in alike.values()]
        return Prefill(self, [self._group(step, which) for which in groups], parts)

    def _groups(self, step: Step, which: list[int]) -> list[list[int]]:
        """As many requests together as the scratch is for; pages that they share count once."""
        groups: list[list[int]] = []
        room = 0
        seen: set[int] = set()
        for b in which:
            own = step.slots[b, self._first(step, b) : step.coded(b)].tolist()
            private = step.ends[b] - step.coded(b) * PAGE_TOKENS
            needed = private + PAGE_TOKENS * len(set(own) - seen)
            if not groups or needed > room:
                groups.append([])
                room, needed = MOST_TOKENS, private + PAGE_TOKENS * len(own)
                seen = set()
            groups[-1].append(b)
            seen.update(own)
            room -= needed
        return groups

    def _sorted(self, step: Step) -> tuple[list[int], list[int]]:
        """Whose context is decoded, and who attends the codes.

        What a page costs to decode is spread over all new tokens that attend it: those of requests
        that share it, too.
        """
        least = WORTH_DECODING.get(self.isa, OTHERWISE)
        short = [b for b in step.chunked if step.new[b] < least and step.coded(b) > 0]
        pages = {int(slot) for b in short for slot in step.slots[b, : step.coded(b)].tolist()}
        if sum(step.new[b] * step.coded(b) for b in short) >= least * len(pages):
            short = []
        return [b for b in step.chunked if b not in short], short

    def memory(self, blocks: int) -> tuple[Tensor, Tensor]:
        """Keys and values of so many scratch blocks, [blocks, kv_heads, 64, dim] each."""
        if len(self._memory) < blocks:
            # What no token was written to is read and masked: it must be finite.
            self._memory = self._memory.new_zeros(blocks, *self._memory.shape[1:])
        keys, values = self._memory[:blocks].chunk(2, 2)
        return keys, values

    def _group(self, step: Step, which: list[int]) -> Group:
        tokens, rows, offsets, sinks = [], [], [], []
        raw_places, new_places, lengths = [], [], []
        # Requests that share pages share their scratch blocks, which come first.
        first = {b: self._first(step, b) for b in which}
        slots = {b: step.slots[b, first[b] : step.coded(b)].tolist() for b in which}
        pages = {
            slot: i for i, slot in enumerate(dict.fromkeys(x for b in which for x in slots[b]))
        }
        tables, blocks = [], len(pages)
        for b in which:
            context, new, span = step.context[b], step.new[b], step.spans[b]
            raw = step.coded(b) * PAGE_TOKENS
            base = blocks * BLOCK - raw
            tokens.append(np.arange(span.start, span.stop))
            if step.sink_rows[b] >= 0 and first[b] == 0 and slots[b]:
                own = np.arange(step.sink_tokens)
                place = own + pages[slots[b][0]] * PAGE_TOKENS
                sinks.append(np.stack([place, np.full_like(own, step.sink_rows[b]), own]))
            held = np.arange(raw, context)
            rows.append(step.row_table[b, held // PAGE_TOKENS])
            offsets.append(held % PAGE_TOKENS)
            raw_places.append(held + base)
            new_places.append(np.arange(context, context + new) + base)
            lengths.append(context + new - first[b] * PAGE_TOKENS)
            private = -(-(context + new - raw) // BLOCK)
            tables.append([pages[x] for x in slots[b]] + list(range(blocks, blocks + private)))
            blocks += private
        most = max(map(len, tables))
        table = torch.tensor([own + [0] * (most - len(own)) for own in tables], dtype=torch.int32)
        counts = [step.new[b] for b in which]
        empty = np.zeros((3, 0), dtype=np.int64)
        replaced = torch.from_numpy(np.concatenate([empty, *sinks], axis=1))
        starts = torch.tensor(list(accumulate(counts, initial=0)), dtype=torch.int32)
        sizes = torch.tensor(lengths, dtype=torch.int32)
        return Group(
            _together(np.concatenate(tokens)),
            torch.tensor(list(pages), dtype=torch.int64),
            torch.from_numpy(np.concatenate(rows)),
            torch.from_numpy(np.concatenate(offsets)),
            (replaced[0], replaced[1], replaced[2]),
            (torch.arange(len(pages) * PAGE_TOKENS), _joined(raw_places), _joined(new_places)),
            starts,
            sizes,
            table,
            self._schedule(starts, sizes),
            blocks,
        )

    def _first(self, step: Step, b: int) -> int:
        """The first page that any new token sees."""
        hidden = 0 if self.window is None else max(0, step.context[b] - self.window + 1)
        return min(hidden // PAGE_TOKENS, step.coded(b))

    def _schedule(self, starts: Tensor, lengths: Tensor) -> Tensor:
        found: Tensor = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(lengths),
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.dim,
            seq_lens=lengths,
            dtype=self.dtype,
            query_start_loc=starts,
            causal=True,
            sliding_window_size=-1 if self.window is None else self.window,
            isa=self.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        )
        return found


@dataclass(frozen=True)
class Prefill:
    """See `AttendChunks`.

    Attributes:
        scratch: Memory, and the kernel's instruction set.
        groups: Requests attended on decoded context.
        parts: Those attended on the codes.
    """

    scratch: Scratch
    groups: list[Group]
    parts: list[Part]

    def __call__(
        self,
        layer: EngineLayer,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        pool: Pool,
        step: Step,
        softmax: Softmax,
        out: Tensor,
    ) -> None:
        """See `AttendChunks`."""
        for part in self.parts:
            attend_part(layer, query, keys, values, pool, part, softmax, out)
        for group in self.groups:
            # One vector subtracted from all keys changes no weight, and what is left of them rounds
            # less: keys of Qwen2.5 are hundreds of times longer than what distinguishes them.
            centred = softmax.softcap is None and softmax.sink_logits is None
            memory = self.scratch.memory(group.blocks)
            parts = _vectors(layer, keys, values, pool, group, centred and len(group.pages) > 0)
            for place, vectors in zip(group.places, parts, strict=True):
                if len(place):
                    ops.cpu_attn_reshape_and_cache(*vectors, *memory, place, self.scratch.isa)
            own, target = query[group.tokens], out[group.tokens]
            self._attend(own, memory, target, group, softmax)
            if not isinstance(group.tokens, slice):
                out[group.tokens] = target

    def _attend(
        self,
        query: Tensor,
        memory: tuple[Tensor, Tensor],
        out: Tensor,
        group: Group,
        softmax: Softmax,
    ) -> None:
        sinks, window = softmax.sink_logits, softmax.sliding_window
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=memory[0],
            value_cache=memory[1],
            output=out,
            query_start_loc=group.starts,
            seq_lens=group.lengths,
            scale=softmax.scaling,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1 if window is None else window,
            block_table=group.table,
            softcap=softmax.softcap or 0.0,
            scheduler_metadata=group.schedule,
            s_aux=sinks if sinks is None or sinks.dtype is torch.bfloat16 else sinks.float(),
        )


def _together(tokens: np.ndarray) -> slice | Tensor:
    first, count = int(tokens[0]), len(tokens)
    if int(tokens[-1]) == first + count - 1:
        return slice(first, first + count)
    return torch.from_numpy(tokens)


def _joined(places: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(places))


Vectors: TypeAlias = tuple[Tensor, Tensor]


def _vectors(
    layer: EngineLayer, keys: Tensor, values: Tensor, pool: Pool, group: Group, centred: bool
) -> tuple[Vectors, Vectors, Vectors]:
    """Keys and values of a group, [tokens, kv_heads, dim]: coded, raw and new."""
    raw = [x[group.rows, :, group.offsets] for x in layer.copies]
    new = [x[group.tokens] for x in (keys, values)]
    if not len(group.pages):
        return (raw[0][:0], raw[1][:0]), (raw[0], raw[1]), (new[0], new[1])
    assert layer.key_map is not None
    slots = group.pages[None]
    starts = torch.arange(slots.shape[1])[None] * PAGE_TOKENS
    pages = Pages(pool, slots, starts, torch.full_like(starts, PAGE_TOKENS), 0, {})
    mean, scale = layer.key_map.mean, layer.key_map.scale
    # In the model's dtype: subtracting it from new keys is one pass then.
    offset = mean.to(keys.dtype) if centred else torch.zeros_like(mean)
    decoded = KeyMap(mean - offset.float(), scale)
    coded = [x[0].transpose(0, 1) for x in layer.code.read(pages, keys.dtype, decoded)]
    places, rows, offsets = group.sinks
    sinks = [x[rows, :, offsets] for x in layer.sinks]
    if centred:
        raw[0], new[0], sinks[0] = (x - offset[0] for x in (raw[0], new[0], sinks[0]))
    for x, first in zip(coded, sinks, strict=True):
        x[places] = first
    return (coded[0], coded[1]), (raw[0], raw[1]), (new[0], new[1])
