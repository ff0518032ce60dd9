"""Prompts, attended by the platform's own kernel on a scratch cache that lives for one call."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from sixfold.cache.engine import AttendChunks, EngineLayer, attend_part
from sixfold.cache.step import Part, Step
from sixfold.cache.transfer import to_device
from sixfold.integrations.vllm.beside import SCRATCH_TOKENS
from sixfold.integrations.vllm.prefill_kernel import (
    Batch,
    FirstChunks,
    Kernel,
    part_of,
    together,
)
from sixfold.kernels.types import KeyMap, Pages, Pool, Softmax
from sixfold.packing import PAGE_TOKENS

BLOCK = PAGE_TOKENS


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
        batch: Where each request is among new tokens and scratch blocks.
        blocks: Scratch blocks in all.
    """

    tokens: slice | Tensor
    pages: Tensor
    rows: Tensor
    offsets: Tensor
    sinks: tuple[Tensor, Tensor, Tensor]
    places: tuple[Tensor, Tensor, Tensor]
    batch: Batch
    blocks: int


class Scratch:
    """Makes the attention of prompts for layers of one shape, and holds the memory it needs."""

    def __init__(self, kernel: Kernel, *, windows: set[int | None]) -> None:
        """For layers with these sliding windows."""
        self.kernel = kernel
        # Where layers differ, each masks for itself, and nothing is left out.
        self.window = next(iter(windows)) if len(windows) == 1 else None

    def plan(self, step: Step, blocks: Sequence[Sequence[int]]) -> AttendChunks:
        """What attends the prompts of a step, whose sequences have these blocks."""
        decoded, coded = self._sorted(step, blocks)
        first = None
        if (packed := self.kernel.attend_packed) is not None:
            fresh = [b for b in decoded if not step.context[b]]
            decoded = [b for b in decoded if step.context[b]]
            first = FirstChunks.of(packed, step, fresh) if fresh else None
        groups = self._groups(step, decoded, blocks)
        alike: dict[int, list[int]] = {}
        for b in coded:
            alike.setdefault(step.new[b], []).append(b)
        parts = [Part.of(step, which) for which in alike.values()]
        made = [self._group(step, which, blocks) for which in groups]
        return Prefill(self.kernel, first, made, parts)

    def _groups(
        self, step: Step, which: list[int], blocks: Sequence[Sequence[int]]
    ) -> list[list[int]]:
        """As many requests together as the scratch is for; pages that they share count once."""
        groups: list[list[int]] = []
        room = 0
        seen: set[int] = set()
        for b in which:
            own = self._shared(step, b, blocks[b])
            opened = step.context[b] // PAGE_TOKENS * PAGE_TOKENS
            private = -(-step.ends[b] // BLOCK) * BLOCK - opened
            needed = private + PAGE_TOKENS * len(set(own) - seen)
            if not groups or needed > room:
                groups.append([])
                room, needed = SCRATCH_TOKENS, private + PAGE_TOKENS * len(own)
                seen = set()
            groups[-1].append(b)
            seen.update(own)
            room -= needed
        return groups

    def _sorted(self, step: Step, blocks: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
        """Whose context is decoded, and who attends the codes.

        What a page costs to decode is spread over all new tokens that attend it: those of requests
        that share it, too.
        """
        least = self.kernel.worth_decoding
        short = [b for b in step.chunked if step.new[b] < least and step.coded(b) > 0]
        pages = {block for b in short for block in blocks[b][: step.coded(b)]}
        if sum(step.new[b] * step.coded(b) for b in short) >= least * len(pages):
            short = []
        return [b for b in step.chunked if b not in short], short

    def _group(self, step: Step, which: list[int], held_in: Sequence[Sequence[int]]) -> Group:
        tokens, rows, offsets, sinks = [], [], [], []
        raw_places, new_places, lengths = [], [], []
        # Requests that share pages share their scratch blocks, which come first: those of codes,
        # then those of raw copies.
        shared = {b: self._shared(step, b, held_in[b]) for b in which}
        once = sorted(dict.fromkeys(x for b in which for x in shared[b]), key=lambda x: x < 0)
        place_of = {page: i for i, page in enumerate(once)}
        coded = [page for page in once if page >= 0]
        for page in once[len(coded) :]:
            rows.append(np.full(PAGE_TOKENS, -1 - page))
            offsets.append(np.arange(PAGE_TOKENS))
            raw_places.append(place_of[page] * PAGE_TOKENS + offsets[-1])
        tables, blocks = [], len(once)
        for b in which:
            context, new, span = step.context[b], step.new[b], step.spans[b]
            opened = context // PAGE_TOKENS * PAGE_TOKENS
            base = blocks * BLOCK - opened
            tokens.append(np.arange(span.start, span.stop))
            first = self._first(step, b)
            if step.sink_rows[b] >= 0 and first == 0 and shared[b] and shared[b][0] >= 0:
                own = np.arange(step.sink_tokens)
                place = own + place_of[shared[b][0]] * PAGE_TOKENS
                sinks.append(np.stack([place, np.full_like(own, step.sink_rows[b]), own]))
            held = np.arange(opened, context)
            rows.append(step.row_table[b, held // PAGE_TOKENS])
            offsets.append(held % PAGE_TOKENS)
            raw_places.append(held + base)
            new_places.append(np.arange(context, context + new) + base)
            lengths.append(context + new - first * PAGE_TOKENS)
            private = -(-(context + new - opened) // BLOCK)
            tables.append([place_of[x] for x in shared[b]] + [*range(blocks, blocks + private)])
            blocks += private
        most = max(map(len, tables))
        table = np.array([own + [0] * (most - len(own)) for own in tables], dtype=np.int32)
        counts = [step.new[b] for b in which]
        empty = np.zeros((3, 0), dtype=np.int64)
        replaced = np.concatenate([empty, *sinks], axis=1)
        on = partial(to_device, device=step.slots.device)
        starts = on(np.array(list(accumulate(counts, initial=0)), dtype=np.int32))
        sizes = on(np.array(lengths, dtype=np.int32))
        places = (
            np.arange(len(coded) * PAGE_TOKENS),
            np.concatenate(raw_places),
            np.concatenate(new_places),
        )
        return Group(
            together(np.concatenate(tokens), on),
            on(np.array(coded, dtype=np.int64)),
            on(np.concatenate(rows)),
            on(np.concatenate(offsets)),
            (on(replaced[0]), on(replaced[1]), on(replaced[2])),
            (on(places[0]), on(places[1]), on(places[2])),
            Batch(
                starts,
                sizes,
                on(table),
                self.kernel.schedule(starts, sizes, self.window),
                (max(counts), max(lengths)),
            ),
            blocks,
        )

    def _shared(self, step: Step, b: int, blocks: Sequence[int]) -> list[int]:
        """The full pages that its new tokens see: blocks of codes, -1 - row of what is raw."""
        pages, row = blocks[self._first(step, b) : step.coded(b)], step.previous(b)
        return [*pages, -1 - row] if row >= 0 else [*pages]

    def _first(self, step: Step, b: int) -> int:
        """The first page that any new token sees."""
        hidden = 0 if self.window is None else max(0, step.context[b] - self.window + 1)
        return min(hidden // PAGE_TOKENS, step.coded(b))


@dataclass(frozen=True)
class Prefill:
    """See `AttendChunks`.

    Attributes:
        kernel: What attends uncompressed tokens, and its memory.
        first: Requests without context; None: there are none, or they are among `groups`.
        groups: Requests attended on decoded context.
        parts: Those attended on the codes.
    """

    kernel: Kernel
    first: FirstChunks | None
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
        if self.first is not None:
            self.first.attend(query, keys, values, softmax, out)
        for group in self.groups:
            # One vector subtracted from all keys changes no weight, and what is left of them rounds
            # less: keys of Qwen2.5 are hundreds of times longer than what distinguishes them.
            centred = softmax.softcap is None and softmax.sink_logits is None
            memory = self.kernel.memory(group.blocks)
            parts = _vectors(layer, keys, values, pool, group, centred and len(group.pages) > 0)
            for place, vectors in zip(group.places, parts, strict=True):
                if len(place):
                    self.kernel.write(*vectors, memory, place)
            with part_of(out, group.tokens) as target:
                self.kernel.attend(query[group.tokens], memory, target, group.batch, softmax)


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
    starts = torch.arange(slots.shape[1], device=slots.device)[None] * PAGE_TOKENS
    pages = Pages(pool, slots, starts, torch.full_like(starts, PAGE_TOKENS), 0)
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
