"""A serving engine's layer: any schedule gives every sequence what it gets alone."""

import dataclasses
import random
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sixfold.cache.engine import EngineLayer
from sixfold.cache.step import Step
from sixfold.errors import ShapeError, SixfoldError
from sixfold.kernels.types import CodeName, KeyMap, Pool
from sixfold.packing import PAGE_TOKENS
from tests.engine import (
    DIM,
    HEADS,
    KV_HEADS,
    SCALING,
    VALUE_DIM,
    Engine,
    Request,
    check_codes,
    decoded,
    engine_layer,
    exact,
    relative,
    request,
    run_alone,
)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 50}, {"softcap": 3.0}], ids=str)
@pytest.mark.parametrize("chunk", [1, 7, 48, 64, 200])
def test_chunks_of_any_size_give_attention(chunk: int, options: dict[str, Any]) -> None:
    one = request(200, 1)
    chunks = [min(chunk, 200 - start) for start in range(0, 200, chunk)]
    assert relative(run_alone(one, chunks, None, **options), exact(one, **options)) < 0.02


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("recent", [False, True])
@pytest.mark.parametrize("chunks", [[140, *[1] * 60], [40, 7, 100, 1, 52], [64, 64, 64, 8], [200]])
@pytest.mark.parametrize("code", get_args(CodeName))
def test_raw_copies_are_read_in_place_of_codes(
    sinks: int, recent: bool, chunks: list[int], code: CodeName
) -> None:
    """At 1 bit a copy and its codes are far from each other."""
    layer = engine_layer(bits=1, sinks=sinks, code=code)
    engine, one = Engine(layer, recent=recent), request(201, 1)
    engine.start(one)
    for new in chunks:
        engine.step([(one, new)])
    shown = decoded(layer, engine.pool, one.blocks[:3])
    raw = [*range(sinks), *range(128 if recent else 192, 200)]
    mixed = dataclasses.replace(one)
    for i, name in enumerate(("keys", "values")):
        x = getattr(one, name).clone()
        x[:192] = shown[i]
        x[raw] = getattr(one, name)[raw]
        setattr(mixed, name, x)
    (out,) = engine.step([(one, 1)])
    assert relative(out, exact(mixed)[200:]) < 2e-2


def test_what_is_not_coded_is_exact() -> None:
    one = request(PAGE_TOKENS, 2)
    assert relative(run_alone(one, [20, 1, 1, 42], None), exact(one)) < 1e-6


schedules = st.lists(
    st.tuples(st.integers(1, 200), st.integers(1, 70), st.integers(0, 9)), min_size=1, max_size=6
)


@settings(max_examples=8, deadline=None)
@given(
    schedules=schedules,
    seed=st.integers(0, 100),
    sinks=st.integers(0, 4),
    recent=st.booleans(),
    code=st.sampled_from(get_args(CodeName)),
)
def test_any_schedule_is_each_sequence_alone(
    schedules: list[tuple[int, int, int]], seed: int, sinks: int, recent: bool, code: CodeName
) -> None:
    """Prefills in chunks beside decodes, late arrivals, preemption; one key map for all."""
    # A trellis has 4 bits at most: what it loses says little, but more than a wrong page would.
    bits, error = (8, 0.03) if code == "codebook" else (4, 0.4)
    order = random.Random(seed)
    maps = KeyMap(torch.randn(1, KV_HEADS, DIM), torch.rand(1, KV_HEADS, DIM) + 0.5)
    layer = engine_layer(bits=bits, key_map=maps, sinks=sinks, code=code)
    engine = Engine(layer, seed=seed, recent=recent)
    requests = [request(tokens, seed + i) for i, (tokens, _, _) in enumerate(schedules)]
    waiting = {i: late for i, (_, _, late) in enumerate(schedules)}
    running: list[int] = []
    preempted: set[int] = set()
    chunks: dict[int, list[int]] = {}
    outputs: dict[int, list[Tensor]] = {}
    for now in range(2000):
        for i in [i for i, late in waiting.items() if late <= now]:
            del waiting[i]
            engine.start(requests[i])
            running.append(i)
            chunks[i], outputs[i] = [], []
        if not running and not waiting:
            break
        work: list[tuple[Request, int]] = []
        chosen = [i for i in running if order.random() < 0.8]
        for i in chosen:
            one, most = requests[i], schedules[i][1]
            # Half of a prompt in chunks, the rest token by token.
            new = most if one.done < one.tokens // 2 else 1
            chunks[i].append(min(new, one.tokens - one.done))
            work.append((one, chunks[i][-1]))
        if not work:
            continue
        for i, out in zip(chosen, engine.step(work), strict=True):
            outputs[i].append(out)
        for i in chosen:
            if requests[i].done == requests[i].tokens:
                engine.stop(requests[i])
                running.remove(i)
            elif i not in preempted and order.random() < 0.05:
                preempted.add(i)
                engine.stop(requests[i])
                running.remove(i)
                waiting[i] = now + 3
    assert not running
    for i, one in enumerate(requests):
        together = torch.cat(outputs[i])
        alone = run_alone(one, chunks[i], maps, sinks=sinks, recent=recent, bits=bits, code=code)
        torch.testing.assert_close(together, alone, rtol=2e-3, atol=2e-3)
        assert relative(together, exact(one)) < error


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("code", get_args(CodeName))
def test_codes_are_those_of_each_page_alone(pinned: bool, code: CodeName) -> None:
    """Prompts of any length, at any place of a page, together."""
    maps = KeyMap(torch.randn(1, KV_HEADS, DIM), torch.rand(1, KV_HEADS, DIM) + 0.5)
    layer = engine_layer(bits=4, key_map=maps if pinned else None, code=code)
    engine = Engine(layer, blocks=60)
    lengths = [(20, 300), (0, 70), (0, 128), (64, 64), (0, 600), (63, 1), (64, 256), (5, 190)]
    requests = [request(sum(parts), i) for i, parts in enumerate(lengths)]
    for i, one in enumerate(requests):
        engine.start(one)
        if lengths[i][0]:
            engine.step([(one, lengths[i][0])])
    engine.step([(one, new) for one, (_, new) in zip(requests, lengths, strict=True)])
    assert check_codes(engine, requests) == 28


def test_the_output_may_be_somebody_elses_memory() -> None:
    plain, given = Engine(engine_layer()), Engine(engine_layer())
    outs = []
    for engine in (plain, given):
        one, found = request(90, 1), []
        engine.start(one)
        for new in (70, 1, 19):
            memory = torch.full((new + 5, 2 * HEADS, VALUE_DIM), torch.nan)
            own = memory[2 : 2 + new, ::2]
            found += engine.step([(one, new)], **({"out": own} if engine is given else {}))
            if engine is given:
                assert found[-1].data_ptr() == own.data_ptr()
                assert memory[:, 1::2].isnan().all()
        outs.append(found)
    assert all(map(torch.equal, *outs))


def test_a_shared_prefix_is_read_from_the_same_blocks() -> None:
    engine = Engine(engine_layer())
    first, second = request(200, 1), request(200, 1)
    engine.start(first)
    engine.step([(first, 150)])
    engine.start(second)
    second.blocks, second.done = first.blocks[:2], 128
    before = [x.clone() for x in engine.pool]
    (out,) = engine.step([(second, 30)])
    shared = torch.tensor(first.blocks[:2])
    for old, new in zip(before, engine.pool, strict=True):
        assert torch.equal(old[shared], new[shared])
    assert relative(out, exact(second)[128:158]) < 0.02


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
@pytest.mark.parametrize("recent", [False, True])
def test_blocks_are_shared_in_the_step_that_fills_them(order: list[int], recent: bool) -> None:
    """Of the first step, too: before it there is no map."""
    engine = Engine(engine_layer(), recent=recent)
    first, second = request(200, 1), request(200, 1)
    engine.start(first)
    engine.start(second)
    first.blocks = [engine.free.pop() for _ in range(3)]
    second.blocks, second.done = first.blocks[:2], 128
    work = [(first, 150), (second, 40)]
    found = engine.step([work[i] for i in order])
    assert relative(found[order.index(1)], exact(second)[128:168]) < 0.02
    assert relative(found[order.index(0)], exact(first)[:150]) < 0.02


@pytest.mark.parametrize("code", get_args(CodeName))
def test_blocks_lie_where_they_may(code: CodeName) -> None:
    """Codes in an engine's blocks are those in memory of our own."""
    layer = engine_layer(bits=3, code=code)
    memory = torch.zeros(6, 3, KV_HEADS, layer.block_bytes, dtype=torch.uint8)
    ours = layer.pool(torch.zeros(6, KV_HEADS, layer.block_bytes, dtype=torch.uint8))
    theirs = layer.pool(memory[:, 2])
    one = request(150, 4)
    for pool in (ours, theirs):
        step = Step([150], [0], torch.tensor([[5, 0, 3]]), torch.tensor([[-1, -1, 2]]))
        arguments = one.query, one.keys, one.values, pool, step
        layer.attend(*arguments, scaling=SCALING)
    assert isinstance(theirs, Pool)
    assert all(map(torch.equal, ours, theirs))
    assert not memory[:, :2].any()


def test_the_document_runs() -> None:
    text = (Path(__file__).parents[2] / "docs" / "engine.md").read_text()
    found: dict[str, Any] = {}
    exec(text.split("```python")[1].split("```")[0], found)
    assert found["out"].shape == (101, 8, 64)


class TestRefusals:
    def test_a_page_that_is_not_in_the_table(self) -> None:
        with pytest.raises(ShapeError, match="slots: expected 3 pages for 130 tokens, got 2"):
            Step([1, 2], [0, 128], torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2).long())

    def test_tables_of_other_batches(self) -> None:
        with pytest.raises(ShapeError, match="context of 1 sequences"):
            Step([1], [0, 1], torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2).long())

    def test_no_new_token(self) -> None:
        with pytest.raises(SixfoldError, match="new must be 1 to"):
            Step([0], [5], torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2).long())

    @pytest.mark.usefixtures("unhooked")
    def test_tokens_that_do_not_fit(self) -> None:
        layer, one = engine_layer(), request(1, 1)
        step = Step([1], [0], torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1).long())
        pool = layer.pool(torch.zeros(2, KV_HEADS, layer.block_bytes, dtype=torch.uint8))
        good = {"query": one.query, "keys": one.keys, "values": one.values}
        for name, x in (
            ("query", one.query.repeat(2, 1, 1)),
            ("query", one.query[:, :3]),
            ("keys", one.keys[:, :1]),
            ("keys", one.keys[..., :1]),
            ("values", one.values[:, :1, :1]),
            ("values", one.values.half()),
        ):
            given = good | {name: x}
            with pytest.raises(ShapeError, match=r"(query|keys|values): expected"):
                layer.attend(*given.values(), pool, step, scaling=1.0)
        assert layer.copies[0].isnan().all()

    def test_blocks_of_another_width(self) -> None:
        with pytest.raises(ShapeError, match="blocks: expected uint8"):
            engine_layer(bits=4).pool(torch.zeros(2, KV_HEADS, 100, dtype=torch.uint8))

    @pytest.mark.parametrize(
        ("slots", "rows"),
        [([[0, 9]], [0, 1]), ([[0, -1]], [0, 1]), ([[0, 1]], [0, -2]), ([[0, 1]], [0, 16])],
    )
    @pytest.mark.parametrize(("new", "context"), [(1, 100), (70, 0), (3, 100)])
    def test_tables_that_lead_outside(
        self, slots: list[list[int]], rows: list[int], new: int, context: int
    ) -> None:
        layer, one = engine_layer(), request(70, 1)
        pool = layer.pool(torch.zeros(2, KV_HEADS, layer.block_bytes, dtype=torch.uint8))
        step = Step([new], [context], torch.tensor(slots), torch.tensor([rows]))
        own = (x[:new] for x in (one.query, one.keys, one.values))
        with pytest.raises(ShapeError, match=r"(slots|rows): expected slots 0 to"):
            layer.attend(*own, pool, step, scaling=1.0)
        assert layer.copies[0].isnan().all()
        assert layer.key_map is None

    def test_two_sequences_in_one_row(self) -> None:
        layer, one = engine_layer(), request(2, 1)
        pool = layer.pool(torch.zeros(2, KV_HEADS, layer.block_bytes, dtype=torch.uint8))
        step = Step([1, 1], [0, 0], torch.tensor([[0], [1]]), torch.tensor([[3], [3]]))
        with pytest.raises(
            ShapeError, match="rows: expected one of its own for each page that is w"
        ):
            layer.attend(one.query, one.keys, one.values, pool, step, scaling=1.0)

    def test_two_pages_in_one_block(self) -> None:
        layer, one = engine_layer(), request(130, 1)
        pool = layer.pool(torch.zeros(2, KV_HEADS, layer.block_bytes, dtype=torch.uint8))
        step = Step([130], [0], torch.tensor([[1, 1, 0]]), torch.tensor([[-1, -1, 3]]))
        with pytest.raises(ShapeError, match="slots: expected one of its own for each page"):
            layer.attend(one.query, one.keys, one.values, pool, step, scaling=1.0)
        assert layer.copies[0].isnan().all()

    def test_a_context_that_nobody_coded(self) -> None:
        layer, one = engine_layer(), request(1, 1)
        pool = layer.pool(torch.zeros(2, KV_HEADS, layer.block_bytes, dtype=torch.uint8))
        step = Step([1], [64], torch.tensor([[0, 1]]), torch.tensor([[-1, 3]]))
        with pytest.raises(SixfoldError, match="64 tokens of context and nothing coded yet"):
            layer.attend(one.query, one.keys, one.values, pool, step, scaling=1.0)


@pytest.mark.parametrize(
    "out",
    [
        torch.zeros(80, HEADS, DIM),
        torch.zeros(79, HEADS, VALUE_DIM),
        torch.zeros(80, HEADS, VALUE_DIM, dtype=torch.float64),
        torch.zeros(80, HEADS, VALUE_DIM, device="meta"),
    ],
)
def test_memory_for_the_output_must_fit(out: Tensor, unhooked: None) -> None:
    engine, one = Engine(engine_layer()), request(80, 1)
    engine.start(one)
    with pytest.raises(SixfoldError, match="out"):
        engine.step([(one, 80)], out=out)


def test_chunks_may_be_attended_by_others() -> None:
    """Those with one new token are not theirs; what they leave is the output."""
    asked: list[list[int]] = []

    def chunks(layer: EngineLayer, *given: Any) -> None:
        *_, step, _, out = given
        asked.append(step.chunked)
        out[step.spans[1]] = 7.0

    engine, first, second = Engine(engine_layer()), request(100, 1), request(90, 2)
    engine.start(first)
    engine.start(second)
    engine.step([(first, 80)])
    one, several = engine.step([(first, 1), (second, 80)], chunks=chunks)
    assert asked == [[1]]
    assert (several == 7).all()
    assert relative(one, exact(first)[80:81]) < 0.02
    (after,) = engine.step([(second, 10)])
    assert relative(after, exact(second)[80:]) < 0.02


def test_a_step_that_was_refused_can_be_repeated() -> None:
    """One sequence of it has a block that does not exist: nothing of the others is stored."""
    layer = engine_layer(
        key_map=KeyMap(torch.zeros(1, KV_HEADS, DIM), torch.ones(1, KV_HEADS, DIM))
    )
    engine, one, other = Engine(layer), request(82, 1), request(100, 2)
    engine.start(one)
    engine.step([(one, 30)])
    row = (one.rows[0] + 1) % 8
    one.blocks += [engine.free.pop()]
    packed = [
        torch.cat([getattr(one, name)[30:80], getattr(other, name)])
        for name in ("query", "keys", "values")
    ]
    for blocks in ([99, 4], [engine.free[0], engine.free[1]]):
        slots = torch.tensor([one.blocks, blocks])
        rows = torch.tensor([[one.rows[0], row], [-1, row + 1]])
        step = Step([50, 100], [30, 0], slots, rows)
        if 99 in blocks:
            with pytest.raises(ShapeError, match="slots"):
                layer.attend(*packed, engine.pool, step, scaling=SCALING)
        else:
            out = layer.attend(*packed, engine.pool, step, scaling=SCALING)
    assert relative(out[:50], exact(one)[30:80]) < 0.02
    assert relative(out[50:], exact(other)) < 0.02


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_blocks_that_left_a_window_may_hold_anything(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIXFOLD_BACKEND", backend)
    layer, one = engine_layer(sliding_window=40), request(201, 1)
    engine = Engine(layer)
    engine.start(one)
    engine.step([(one, 200)])
    for x in engine.pool:
        x.view(torch.uint8)[torch.tensor(one.blocks[:2])] = 0xFF
    (out,) = engine.step([(one, 1)])
    assert relative(out, exact(one, 40)[200:]) < 0.02
