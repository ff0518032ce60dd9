"""Timing: medians of alternating calls, bytes that are held, errors that are errors."""

import pytest
import torch

from sixfold.errors import SixfoldError
from sixfold.eval import machine
from sixfold.eval.caches import compressed, uncompressed
from sixfold.eval.decoding import decode_costs
from sixfold.eval.speed import OPERATIONS, AttentionShape, measure_speed, relative_error
from sixfold.eval.timing import Timing, interleave
from tests.tiny import VOCABULARY, tiny_model

SHAPE = AttentionShape(tokens=256, heads=4, kv_heads=2, head_dim=64)


def test_timing_is_median_and_spread() -> None:
    timing = Timing.of([4.0, 1.0, 2.0, 3.0, 100.0])
    assert (timing.median, timing.calls) == (3.0, 5)
    assert timing.spread == pytest.approx((52 - 1.5) / 3)
    assert Timing.of([2.0]) == Timing(2.0, 0.0, 1)


def test_calls_alternate_and_warm_up() -> None:
    order: list[str] = []
    timings = interleave(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3, warmup=1
    )
    assert order == ["a", "b"] * 4
    assert timings["a"].calls == timings["b"].calls == 3


def test_every_operation_beside_its_baseline() -> None:
    rows = measure_speed(OPERATIONS, SHAPE, [8, 2.5], repeats=1)
    assert {row.operation for row in rows} == set(OPERATIONS)
    errors = {(row.operation, row.implementation): row.error for row in rows}
    assert errors["encode", "copy bf16"] == 0
    # A bfloat16 has eight significant bits.
    assert errors["attention", "sdpa bf16"] < 2**-7
    assert errors["attention", "grouped matmul bf16"] < 2**-6
    assert errors["scores", "matmul bf16"] < 2**-7
    for operation in OPERATIONS:
        eight, low = (
            next(e for (op, name), e in errors.items() if op == operation and f"{b} bits" in name)
            for b in ("8", "2.5")
        )
        assert eight < 0.02 < low < 0.5
    sizes = {(row.operation, row.implementation): row.nbytes for row in rows}
    assert sizes["scores", "codes 8 bits"] == 2 * 256 * (64 + 2)
    assert sizes["attention", "sdpa bf16"] == 2 * 2 * 256 * 64 * 2


def test_bandwidth_is_bytes_over_time() -> None:
    row = measure_speed(["scores"], SHAPE, [4], repeats=1)[0]
    assert row.gigabytes_per_second == pytest.approx(row.nbytes / row.time.median / 1e9)
    assert row.to_dict()["time"]["median"] == row.time.median


def test_relative_error() -> None:
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(torch.tensor([3.0, 3.0]), exact) == pytest.approx(0.2)


def test_impossible_benchmarks_are_refused() -> None:
    with pytest.raises(SixfoldError, match="expected operations among"):
        measure_speed(["sort"], SHAPE, [4])
    with pytest.raises(SixfoldError, match="must be a multiple of key heads, got 3 and 2"):
        measure_speed(["scores"], AttentionShape(64, 3, 2, 64), [4])


def test_decoding_counts_the_prefill() -> None:
    context = torch.randint(VOCABULARY, (300,), generator=torch.Generator().manual_seed(0))
    costs = decode_costs(tiny_model(), context, {"16": uncompressed, "4": compressed(4)}, steps=2)
    # Two layers, keys and values, two heads of 32 in float32.
    assert costs["16"].nbytes == 2 * 2 * 2 * 32 * 4 * 300
    assert costs["4"].nbytes < costs["16"].nbytes
    assert costs["4"].tokens == 300
    assert costs["4"].tokens_per_second == pytest.approx(1 / costs["4"].step.median)


def test_machine_is_described() -> None:
    facts = machine.describe()
    assert facts["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert facts["threads"] >= 1
    assert facts["processor"] in machine.one_line() or facts["gpu"]
