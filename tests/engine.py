"""An engine of one layer, its requests, and what they get alone."""

import dataclasses
import random
from typing import Any

import torch
from torch import Tensor

from sixfold.cache import CachePolicy
from sixfold.cache.engine import EngineLayer
from sixfold.cache.step import Step
from sixfold.kernels.types import CodeName, KeyMap, Pages, Pool
from sixfold.packing import PAGE_TOKENS

HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 32, 48
SCALING = DIM**-0.5


def engine_layer(
    rows: int = 16,
    bits: float = 8,
    sinks: int = 0,
    code: CodeName = "codebook",
    **options: Any,
) -> EngineLayer:
    layer = EngineLayer(
        CachePolicy(bits, bits, sink_tokens=sinks, recent_window=0, code=code),
        KV_HEADS,
        DIM,
        VALUE_DIM,
        rows,
        dtype=torch.float32,
        device=torch.device("cpu"),
        sink_rows=rows if sinks else 0,
        **options,
    )
    for x in (*layer.copies, *layer.sinks):
        # What was never written may be anything.
        x.fill_(torch.nan)
    return layer


@dataclasses.dataclass
class Request:
    """A sequence, and how far the engine is with it."""

    query: Tensor  # [tokens, heads, dim]
    keys: Tensor
    values: Tensor
    blocks: list[int] = dataclasses.field(default_factory=list)
    rows: dict[int, int] = dataclasses.field(default_factory=dict)  # of pages
    sink: int = -1
    done: int = 0

    @property
    def tokens(self) -> int:
        return len(self.query)


def request(tokens: int, seed: int) -> Request:
    generator = torch.Generator().manual_seed(seed)

    def gaussian(heads: int, dim: int) -> Tensor:
        return torch.randn(tokens, heads, dim, generator=generator)

    offset = 5 * torch.randn(KV_HEADS, DIM, generator=torch.Generator().manual_seed(0))
    keys = gaussian(KV_HEADS, DIM) + offset
    return Request(gaussian(HEADS, DIM), keys, gaussian(KV_HEADS, VALUE_DIM))


class Engine:
    """The least that an engine is: blocks that are handed out and taken back, rows likewise."""

    def __init__(
        self, layer: EngineLayer, blocks: int = 40, seed: int = 0, recent: bool = False
    ) -> None:
        self.layer, self.recent = layer, recent
        # Blocks of one layer among those of others.
        memory = torch.full((blocks, 2, KV_HEADS, layer.block_bytes), 0x7E, dtype=torch.uint8)
        self.pool = layer.pool(memory[:, 1])
        order = random.Random(seed)
        self.free = list(range(blocks))
        order.shuffle(self.free)
        self.rows = list(range(len(layer.copies[0])))
        order.shuffle(self.rows)
        self.sink_rows = list(range(len(layer.sinks[0])))

    def start(self, one: Request) -> None:
        one.done = 0
        one.sink = self.sink_rows.pop() if self.sink_rows else -1

    def stop(self, one: Request) -> None:
        """Finished, aborted or preempted: what it had is somebody else's."""
        self.rows += one.rows.values()
        self.sink_rows += [one.sink] if one.sink >= 0 else []
        self.free += one.blocks
        one.blocks, one.rows, one.done = [], {}, 0

    def plan(self, work: list[tuple[Request, int]]) -> Step:
        """Blocks, and rows for pages that are open; for those before them if asked to."""
        for one, new in work:
            while len(one.blocks) * PAGE_TOKENS < one.done + new:
                one.blocks.append(self.free.pop())
            last, rest = divmod(one.done + new, PAGE_TOKENS)
            for page in [last] * (rest > 0) + [last - 1] * (self.recent and last > 0):
                if page not in one.rows and page >= one.done // PAGE_TOKENS:
                    one.rows[page] = self.rows.pop()
        most = max(len(one.blocks) for one, _ in work)
        slots = torch.tensor([one.blocks + [0] * (most - len(one.blocks)) for one, _ in work])
        rows = torch.tensor([[one.rows.get(page, -1) for page in range(most)] for one, _ in work])
        return Step(
            [new for _, new in work],
            [one.done for one, _ in work],
            slots,
            rows,
            torch.tensor([one.sink for one, _ in work]) if self.layer.policy.sink_tokens else None,
            self.layer.policy.sink_tokens,
        )

    def step(self, work: list[tuple[Request, int]], **options: Any) -> list[Tensor]:
        """Run so many tokens of each request; the output of each."""
        plan = self.plan(work)
        packed = [
            torch.cat([getattr(one, name)[one.done : one.done + new] for one, new in work])
            for name in ("query", "keys", "values")
        ]
        query, keys, values = packed
        out = self.layer.attend(query, keys, values, self.pool, plan, scaling=SCALING, **options)
        for one, new in work:
            one.done += new
            kept = one.done // PAGE_TOKENS - self.recent
            for page in [page for page in one.rows if page < kept]:
                self.rows.append(one.rows.pop(page))
        return [out[span] for span in plan.spans]


def exact(one: Request, sliding_window: int | None = None, softcap: float | None = None) -> Tensor:
    """Float64 on the exact tokens, [tokens, heads, value_dim]."""
    groups = HEADS // KV_HEADS
    query = one.query.double().transpose(0, 1)
    keys, values = (
        x.double().transpose(0, 1).repeat_interleave(groups, 0) for x in (one.keys, one.values)
    )
    logits = query @ keys.mT * SCALING
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    place = torch.arange(one.tokens)
    hidden = place > place[:, None]
    if sliding_window is not None:
        hidden = hidden | (place <= place[:, None] - sliding_window)
    return (logits.masked_fill(hidden, -torch.inf).softmax(-1) @ values).transpose(0, 1)


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


def run_alone(
    one: Request,
    chunks: list[int],
    key_map: KeyMap | None,
    sliding_window: int | None = None,
    sinks: int = 0,
    recent: bool = False,
    bits: float = 8,
    code: CodeName = "codebook",
    **options: Any,
) -> Tensor:
    layer = engine_layer(4, bits, sinks, code, key_map=key_map, sliding_window=sliding_window)
    engine, found = Engine(layer, seed=5, recent=recent), []
    engine.start(one)
    for new in chunks:
        found += engine.step([(one, new)], **options)
    engine.stop(one)
    return torch.cat(found)


def decoded(layer: EngineLayer, pool: Pool, blocks: list[int]) -> list[Tensor]:
    """Keys and values of whole pages, [tokens, kv_heads, dim]."""
    slots = torch.tensor([blocks])
    starts = torch.arange(len(blocks))[None] * PAGE_TOKENS
    pages = Pages(pool, slots, starts, torch.full_like(starts, PAGE_TOKENS), 0)
    assert layer.key_map is not None
    return [x[0].transpose(0, 1) for x in layer.code.read(pages, torch.float32, layer.key_map)]


def check_codes(engine: Engine, requests: list[Request]) -> int:
    """What is coded of them is what the map of now makes of every page alone."""
    layer, checked = engine.layer, 0
    assert layer.key_map is not None
    shared = layer.key_map._replace(map_index=torch.zeros(1, dtype=torch.int64))
    for one in requests:
        for page in range(one.done // PAGE_TOKENS):
            tokens = slice(page * PAGE_TOKENS, (page + 1) * PAGE_TOKENS)
            expected = layer.pool(torch.zeros(1, KV_HEADS, layer.block_bytes, dtype=torch.uint8))
            keys, values = (x[tokens].transpose(0, 1)[None] for x in (one.keys, one.values))
            layer.code.store(keys, values, torch.zeros(1, 1, dtype=torch.int64), expected, shared)
            for found, alone in zip(engine.pool, expected, strict=True):
                assert torch.equal(found[one.blocks[page]], alone[0])
            checked += 1
    return checked
