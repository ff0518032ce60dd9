"""Which tokens vLLM's backend keeps raw, without vLLM: a scheduler of random requests."""

import dataclasses
import random
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sixfold.errors import SixfoldError
from sixfold.integrations.vllm.beside import Beside
from sixfold.integrations.vllm.names import Options
from sixfold.integrations.vllm.raw_pages import RawPages, SinkRows
from sixfold.packing import PAGE_TOKENS


@dataclasses.dataclass
class Request:
    tokens: int
    blocks: list[int]
    done: int = 0


class Memory:
    """What rows hold, as a layer writes them: (block, generation of the block, tokens)."""

    def __init__(self, pages: RawPages) -> None:
        self.pages = pages
        self.rows: dict[int, tuple[int, int, int]] = {}
        self.generation: dict[int, int] = {}

    def step(self, work: list[tuple[Request, int]]) -> None:
        context = [one.done for one, _ in work]
        ends = [one.done + new for one, new in work]
        blocks = [one.blocks[: -(-(one.done + new) // PAGE_TOKENS)] for one, new in work]
        table = self.pages.step(context, ends, blocks)
        for row, old, own in zip(table, context, blocks, strict=True):
            page, held = divmod(old, PAGE_TOKENS)
            if held:
                assert self.rows[row[page]] == (own[page], self.generation[own[page]], held)
        written: list[int] = []
        for row, old, end, own in zip(table, context, ends, blocks, strict=True):
            for page in range(old // PAGE_TOKENS, -(-end // PAGE_TOKENS)):
                if page * PAGE_TOKENS >= old:
                    self.generation[own[page]] = self.generation.get(own[page], 0) + 1
                tokens = min(end - page * PAGE_TOKENS, PAGE_TOKENS)
                assert tokens == PAGE_TOKENS or row[page] >= 0
                if row[page] >= 0:
                    written.append(int(row[page]))
                    self.rows[int(row[page])] = own[page], self.generation[own[page]], tokens
            every = self.pages.recent and self.pages.most_full == self.pages.rows
            if every and end // PAGE_TOKENS > old // PAGE_TOKENS:
                assert row[end // PAGE_TOKENS - 1] >= 0
        assert len(set(written)) == len(written)
        # All is written before anything is read.
        for row, old, own in zip(table, context, blocks, strict=True):
            page = old // PAGE_TOKENS
            if page and row[page - 1] >= 0:
                block = own[page - 1]
                assert self.rows[row[page - 1]] == (block, self.generation[block], PAGE_TOKENS)
        assert len(self.pages) <= self.pages.rows


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), recent=st.booleans(), most=st.integers(1, 6))
def test_every_row_read_holds_what_was_written_for_its_page(
    seed: int, recent: bool, most: int
) -> None:
    """Chunks, decodes, late arrivals, aborts, preemption, shared prefixes; blocks are few."""
    drive(RawPages(most, recent=recent), most, random.Random(seed), starving=0.1)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), recent=st.booleans(), most=st.integers(1, 6))
def test_the_fewer_rows_of_a_gpu_are_enough(seed: int, recent: bool, most: int) -> None:
    """Where every request that runs is in every step, as vLLM schedules them."""
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=most, max_num_batched_tokens=200 * most)
    )
    options = Options(recent_window=PAGE_TOKENS if recent else 0)
    beside = Beside.of(config, options, gpu=True)
    # Fewer than requests, as where there are many.
    full = min(beside.full, 2)
    rows = beside.rows - beside.full + full
    pages = RawPages(most, recent=recent, rows=rows, full=full)
    drive(pages, most, random.Random(seed), starving=0)
    assert pages.used <= rows


def test_all_requests_begin_and_end_pages_at_once() -> None:
    """The rows of a GPU hold an open page of each, and the last full page of some."""
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=600, max_num_batched_tokens=2048)
    )
    beside = Beside.of(config, Options(), gpu=True)
    assert beside.rows == 600 + 2048 // PAGE_TOKENS + 256
    memory = Memory(RawPages(600, recent=True, rows=beside.rows, full=beside.full))
    running = [Request(200, [3 * i, 3 * i + 1, 3 * i + 2]) for i in range(600)]
    for _ in range(190):
        memory.step([(one, 1) for one in running])
        for one in running:
            one.done += 1


def test_what_is_kept_beside_the_blocks() -> None:
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=16, max_num_batched_tokens=8192)
    )
    assert Beside.of(config, Options(), gpu=False) == Beside(64, 64, 32, 4)
    assert Beside.of(config, Options(recent_window=0), gpu=False) == Beside(32, 0, 32, 4)
    assert Beside.of(config, Options(), gpu=True) == Beside(48, 16, 16, 4)
    assert Beside.of(config, Options(None, 0, 0), gpu=True) == Beside(32, 0, 0, 0)
    short = SimpleNamespace(
        max_num_seqs=256, max_num_batched_tokens=512, long_prefill_token_threshold=16
    )
    config = SimpleNamespace(scheduler_config=short)
    assert Beside.of(config, Options(None, 0, 0), gpu=True) == Beside(256 + 32, 0, 0, 0)


def drive(pages: RawPages, most: int, order: random.Random, starving: float) -> None:
    """A scheduler of random requests; those that run are left out of some steps."""
    memory = Memory(pages)
    free = list(range(1, 60))
    running: list[Request] = []
    shared: list[int] = []
    for _ in range(150):
        if len(running) < most and order.random() < 0.6:
            one = Request(order.randint(1, 400), [])
            if shared and order.random() < 0.3:
                one.blocks = list(shared)
                one.done = len(shared) * PAGE_TOKENS
                one.tokens += one.done
            running.append(one)
        work: list[tuple[Request, int]] = []
        for one in running:
            new = min(one.tokens - one.done, order.choice([1, 1, 1, 30, 64, 200]))
            need = -(-(one.done + new) // PAGE_TOKENS) - len(one.blocks)
            if order.random() < 1 - starving and need <= len(free):
                one.blocks += [free.pop() for _ in range(max(0, need))]
                work.append((one, new))
        begun = [one for one, new in work if one.done == 0 and new >= 2 * PAGE_TOKENS]
        if begun and free and not shared and len(running) < most:
            # As vLLM does: blocks count as cached from the moment that they are to be filled.
            shared = begun[0].blocks[:2]
            one = Request(2 * PAGE_TOKENS + 50, [*shared, free.pop()], 2 * PAGE_TOKENS)
            running.append(one)
            work.append((one, 40))
        if work:
            memory.step(work)
        for one, new in work:
            one.done += new
            if not shared and one.done >= 2 * PAGE_TOKENS:
                shared = one.blocks[:2]
            if one.done == one.tokens or order.random() < 0.03:
                running.remove(one)
                free = [block for block in one.blocks if block not in shared] + free


def test_memory_is_taken_as_requests_come_not_as_they_go() -> None:
    """A thousand requests, two at a time: rows that were used before are used again."""
    pages = RawPages(256, recent=True)
    running = [(n, n + 1) for n in range(0, 2000, 2)]
    for blocks in running:
        for context in range(0, 128, 32):
            pages.step([context] * 2, [context + 32] * 2, [[b * 2, b * 2 + 1] for b in blocks])
    assert pages.used < 100


def test_a_request_whose_open_page_is_gone_is_refused() -> None:
    pages = RawPages(1, recent=False)
    pages.step([0], [10], [[1]])
    for block in (2, 3):
        pages.step([0], [10], [[block]])
    with pytest.raises(SixfoldError, match="a request with 10 tokens of context returned"):
        pages.step([10], [11], [[1]])


def test_sinks_are_found_by_the_block_that_a_prefix_begins_with() -> None:
    sinks = SinkRows(1)
    (first,) = sinks.step([0], [5])
    assert sinks.step([64, 0], [5, 6]).tolist()[0] == first
    begun, shares = sinks.step([0, 64], [5, 5])
    assert begun == shares
    assert sinks.step([64], [7]).tolist() == [-1]
    for block in range(10, 10 + sinks.rows):
        sinks.step([0], [block])
    assert sinks.step([64], [5]).tolist() == [-1]


class TestOptions:
    @pytest.mark.parametrize("config", [None, {}, {"other": 1}, {"sixfold": {}}, object()])
    def test_none(self, config: object) -> None:
        assert Options.read(config) == Options()

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (3, "expected a mapping of"),
            ({"keymap": "x"}, "did you mean key_map"),
            ({"key_map": 3}, "expected a file that KeyMaps.save wrote, got 3"),
            ({"key_map": "no such file"}, "expected a file"),
            ({"key_map": ""}, "expected a file that KeyMaps.save wrote"),
            ({"sink_tokens": -1}, "sink_tokens"),
            ({"sink_tokens": 65}, "sink_tokens"),
            ({"recent_window": 32}, "expected 0 or 64 tokens, got 32"),
            ({"recent_window": False}, "expected 0 or 64"),
            ({"code": "trelis"}, r"code.* must be one of 'codebook', 'trellis', got 'trelis'"),
            ({"code": None}, "must be one of"),
        ],
        ids=str,
    )
    def test_others_are_refused(self, given: object, message: str) -> None:
        with pytest.raises(SixfoldError, match=message):
            Options.read({"sixfold": given})

    @pytest.mark.parametrize("name", ["sixfld", "SIXFOLD", "Sixfold", "six_fold"])
    def test_a_section_of_another_name(self, name: str) -> None:
        with pytest.raises(SixfoldError, match='did you mean "sixfold"'):
            Options.read({name: {"key_map": "x"}})

    def test_options_outside_of_their_section(self) -> None:
        with pytest.raises(SixfoldError, match='"key_map" belongs one level deeper'):
            Options.read({"key_map": "x"})
        assert Options.read({"code": 3, "sixfold": {}}) == Options()
