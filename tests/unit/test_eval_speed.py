"""Timing: medians of alternating calls, bytes that are held, errors that are errors."""

import os

import pytest
import torch

from sixfold.errors import SixfoldError
from sixfold.eval import machine
from sixfold.eval.caches import compressed, uncompressed
from sixfold.eval.decoding import decode_costs
from sixfold.eval.speed import CASES, OPERATIONS, AttentionShape, layers, measure_speed
from sixfold.eval.timing import Case, Contender, Quartiles, measure, relative_error
from tests.tiny import VOCABULARY, tiny_model

SHAPE = AttentionShape(tokens=256, heads=4, kv_heads=2, head_dim=64)


def test_contenders_alternate_and_only_the_call_is_timed() -> None:
    order: list[str] = []

    def contender(name: str) -> Contender:
        return Contender(
            name,
            lambda: order.append(name),
            prepare=lambda: order.append(f"before {name}"),
            lead=lambda: order.append(f"lead of {name}"),
            environment={"SIXFOLD_TEST": name},
        )

    timed = Contender("c", lambda: order.append("c"), timed=lambda: 4.0, steps=2)
    case = Case([contender("a"), contender("b"), timed])
    rows = list(measure(case, repeats=3, settle=0, warmup=1))
    assert order == ["before a", "lead of a", "a", "before b", "lead of b", "b"] * 4
    assert [row.name for row in rows] == ["a", "b", "c"]
    assert rows[2].seconds == Quartiles(2.0, 2.0, 2.0, 3)
    assert rows[2].mean == 2.0
    assert "SIXFOLD_TEST" not in os.environ


def test_quartiles() -> None:
    found = Quartiles.of([5.0, 1.0, 2.0, 3.0, 4.0])
    assert found == Quartiles(2.0, 3.0, 4.0, 5)
    assert found.spread == pytest.approx(2 / 3)
    assert Quartiles.of([2.0]) == Quartiles(2.0, 2.0, 2.0, 1)


def test_every_operation_beside_its_baseline() -> None:
    found = measure_speed(OPERATIONS, SHAPE, [8, 2.5], repeats=1)
    assert tuple(found) == OPERATIONS
    errors, sizes = {}, {}
    for operation, rows in found.items():
        for row in rows:
            assert row.error is not None
            errors[operation, row.name] = row.error
            sizes[operation, row.name] = row.nbytes
    assert errors["encode", "copy of the bfloat16"] == 0
    # A bfloat16 has eight significant bits.
    assert errors["attention", "torch sdpa bf16"] < 2**-7
    assert errors["attention", "torch matmul bf16"] < 2**-6
    assert errors["scores", "torch matmul bf16"] < 2**-7
    for operation in OPERATIONS:
        eight, low = (errors[operation, f"sixfold {bits} bits"] for bits in ("8", "2.5"))
        assert eight < 0.02 < low < 0.5
    assert sizes["scores", "sixfold 8 bits"] == 2 * 256 * (64 + 2)
    assert sizes["attention", "torch sdpa bf16"] == 2 * 2 * 256 * 64 * 2


@pytest.mark.parametrize("operation", OPERATIONS)
def test_before_every_call_comes_the_same_on_other_tensors(operation: str) -> None:
    pair = layers(SHAPE, torch.device("cpu"))
    assert pair[0].keys.data_ptr() != pair[1].keys.data_ptr()
    assert pair[0].values.data_ptr() != pair[1].values.data_ptr()
    for one in CASES[operation](pair, [4]).contenders:
        assert one.lead is not None
        assert one.result is not None
        found, before = (one.result(call()) for call in (one.call, one.lead))
        assert torch.equal(found, before)


def test_bandwidth_is_bytes_over_time() -> None:
    row = measure_speed(["scores"], SHAPE, [4], repeats=1)["scores"][0]
    assert row.gigabytes_per_second == pytest.approx(row.nbytes / row.seconds.median / 1e9)
    document = row.to_dict()
    assert document["seconds"]["median"] == row.seconds.median
    assert document["gigabytes_per_second"] == row.gigabytes_per_second


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
