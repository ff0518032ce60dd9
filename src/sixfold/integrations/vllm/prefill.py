"""Prompts, attended by the platform's own kernel on a scratch cache that lives for one call."""

from dataclasses import dataclass
from itertools import accumulate
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from sixfold.cache.engine import AttendChunks, EngineLayer, attend_part
from sixfold.cache.step import Part, Step
from sixfold.integrations.vllm.prefill_kernel import Batch, Kernel
from sixfold.kernels.types import KeyMap, Pages, Pool, Softmax
from sixfold.packing import PAGE_TOKENS

BLOCK = PAGE_TOKENS
# Scratch of one call, unless one request alone needs more.
MOST_TOKENS = 16_384


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

    def plan(self, step: Step) -> AttendChunks:
        """What attends the prompts of a step."""
        decoded, coded = self._sorted(step)
        groups = self._groups(step, decoded)
        alike: dict[int, list[int]] = {}
        for b in coded:
            alike.setdefault(step.new[b], []).append(b)
        parts = [Part.of(step, which) for which in alike.values()]
        return Prefill(self.kernel, [self._group(step, which) for which in groups], parts)

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
        least = self.kernel.worth_decoding
        short = [b for b in step.chunked if step.new[b] < least and step.coded(b) > 0]
        pages = {int(slot) for b in short for slot in step.slots[b, : step.coded(b)].tolist()}
        if sum(step.new[b] * step.coded(b) for b in short) >= least * len(pages):
            short = []
        return [b for b in step.chunked if b not in short], short

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
            Batch(
                starts,
                sizes,
                table,
                self.kernel.schedule(starts, sizes, self.window),
                (max(counts), max(lengths)),
            ),
            blocks,
        )

    def _first(self, step: Step, b: int) -> int:
        """The first page that any new token sees."""
        hidden = 0 if self.window is None else max(0, step.context[b] - self.window + 1)
        return min(hidden // PAGE_TOKENS, step.coded(b))


@dataclass(frozen=True)
class Prefill:
    """See `AttendChunks`.

    Attributes:
        kernel: What attends uncompressed tokens, and its memory.
        groups: Requests attended on decoded context.
        parts: Those attended on the codes.
    """

    kernel: Kernel
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
            memory = self.kernel.memory(group.blocks)
            parts = _vectors(layer, keys, values, pool, group, centred and len(group.pages) > 0)
            for place, vectors in zip(group.places, parts, strict=True):
                if len(place):
                    self.kernel.write(*vectors, memory, place)
            own, target = query[group.tokens], out[group.tokens]
            self.kernel.attend(own, memory, target, group.batch, softmax)
            if not isinstance(group.tokens, slice):
                out[group.tokens] = target


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
    decoded = KeyMap(torch.zeros_like(mean), scale) if centred else layer.key_map
    coded = [x[0].transpose(0, 1) for x in layer.code.read(pages, keys.dtype, decoded)]
    places, rows, offsets = group.sinks
    sinks = [x[rows, :, offsets] for x in layer.sinks]
    if centred:
        raw[0], new[0], sinks[0] = (
            (x.float() - mean[0]).to(x.dtype) for x in (raw[0], new[0], sinks[0])
        )
    for x, first in zip(coded, sinks, strict=True):
        x[places] = first
    return (coded[0], coded[1]), (raw[0], raw[1]), (new[0], new[1])
