"""Attention on codes and on dense tokens, against softmax in float64."""

import functools
import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sixfold.kernels._dispatch import available_backends
from sixfold.kernels.attention import (
    Partial,
    dense,
    dense_attention,
    exact_attention,
    merge_partials,
    null_partial,
    reference,
    with_sinks,
)
from sixfold.packing import BITS, encode_scale
from tests.kernels.attention_cases import (
    Case,
    assert_accurate,
    assert_as_accurate,
    dense_softmax,
    make_case,
    resized,
)


@pytest.fixture(autouse=True, params=available_backends("attention"))
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test of pages runs on every backend of this install."""
    name = str(request.param)
    monkeypatch.setenv("SIXFOLD_BACKEND", name)
    monkeypatch.setenv("SIXFOLD_CPU_EXACT", "1")
    return name


def check(case: Case) -> Partial:
    got = case.run()
    assert_accurate(got, case, half=os.environ["SIXFOLD_BACKEND"] == "triton")
    return got


# ---------------------------------------------------------------- page_attention


@pytest.mark.parametrize("key_dim", [20, 33, 64, 80, 96, 100])
@pytest.mark.parametrize("bits", BITS)
def test_every_width_and_dim(bits: float, key_dim: int, backend: str) -> None:
    if backend == "triton" and key_dim not in (33, 80):
        pytest.skip("the interpreter takes long: see test_attention_triton.py")
    check(make_case(key_bits=bits, key_dim=key_dim, lengths=(64, 64, 64)))


@pytest.mark.parametrize(
    ("key_bits", "value_bits", "key_dim", "value_dim"),
    [(4, 2, 64, 64), (2.5, 3, 96, 64), (8, 3.5, 33, 128), (1, 4, 128, 20), (3, 2.5, 192, 31)],
)
def test_keys_and_values_may_differ(
    key_bits: float, value_bits: float, key_dim: int, value_dim: int
) -> None:
    got = check(
        make_case(key_bits=key_bits, value_bits=value_bits, key_dim=key_dim, value_dim=value_dim)
    )
    assert got.out.shape == (2, 4, 1, value_dim)


@pytest.mark.parametrize("heads", [(1, 1), (1, 8), (2, 4), (8, 1), (3, 5)])
@pytest.mark.parametrize("queries", [1, 5])
def test_head_groups(heads: tuple[int, int], queries: int) -> None:
    kv_heads, groups = heads
    check(make_case(kv_heads=kv_heads, groups=groups, queries=queries))


@pytest.mark.parametrize(
    "lengths", [(64,), (1,), (63,), (17, 64, 1), (64, 64, 64, 64, 5), (1, 1, 1), (0, 64, 0, 5)]
)
def test_partial_pages(lengths: tuple[int, ...]) -> None:
    check(make_case(lengths=lengths, queries=3))


@pytest.mark.parametrize("sharpness", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("bits", [2.5, 4])
def test_flat_and_peaked_softmax(sharpness: float, bits: float) -> None:
    check(make_case(key_bits=bits, lengths=(64,) * 5, queries=4, sharpness=sharpness))


def test_huge_logits_do_not_overflow() -> None:
    case = make_case(queries=2, sharpness=1e6)
    case.options["logit_offset"] = torch.full((2, 4, 2), -3e6)
    assert check(case).out.isfinite().all()


@pytest.mark.parametrize("key_size", [2.0**-60, 1.0, 2.0**60])
@pytest.mark.parametrize("value_size", [2.0**-90, 2.0**-15, 2.0**20, 2.0**90])
@pytest.mark.parametrize("queries", [1, 20])
def test_sizes_of_keys_and_values_do_not_matter(
    key_size: float, value_size: float, queries: int
) -> None:
    case = make_case(queries=queries)
    expected, got = resized(case, 1, 1).run(), resized(case, key_size, value_size).run()
    torch.testing.assert_close(got.out / value_size, expected.out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.lse, expected.lse)


def test_first_token_hides_what_lies_before_it() -> None:
    case = make_case(batch=3, queries=4, lengths=(64, 30, 64))
    case.first_token = torch.tensor([[0, 1, 2, 3], [64, 70, 93, 94], [157, 158, 200, 0]])
    got = check(case)
    assert got.lse[2, :, 1:3].eq(-torch.inf).all()


@pytest.mark.parametrize("mask_shape", [(2, 1), (1, 1), (2, 4), (1, 4)])
@pytest.mark.parametrize("additive", [False, True])
def test_masks(mask_shape: tuple[int, int], additive: bool) -> None:
    case = make_case(queries=6, lengths=(64, 9, 64))
    # Masks cover later tokens too: the window, which is not in pages.
    mask = torch.rand(*mask_shape, 6, case.tokens + 20) < 0.5
    mask[:, :, 2] = False
    oracle_mask: Tensor = mask
    if additive:
        bias = torch.randn(mask.shape)
        oracle_mask = torch.where(mask, bias, -torch.inf)
        mask = torch.where(mask, bias, torch.finfo(torch.float32).min)
    case.options["mask"] = mask
    got = case.run()
    case.options["mask"] = oracle_mask[..., : case.tokens]
    assert_accurate(got, case, half=os.environ["SIXFOLD_BACKEND"] == "triton")
    assert got.lse[:, :, 2].eq(-torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_lowest_number_of_a_narrow_mask_means_never(dtype: torch.dtype) -> None:
    case = make_case(queries=2)
    mask = torch.rand(2, 1, 2, case.tokens) < 0.5
    case.options["mask"] = torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)
    got = case.run()
    case.options["mask"] = mask
    assert_accurate(got, case, half=os.environ["SIXFOLD_BACKEND"] == "triton")


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_logit_offset_and_softcap(softcap: float | None) -> None:
    case = make_case(queries=3, sharpness=4.0)
    case.options |= {"logit_offset": 10 * torch.randn(2, 4, 3), "softcap": softcap}
    got = check(case)
    del case.options["logit_offset"]
    change = (case.run().lse - got.lse).abs().min()
    assert change > 1e-3, "the offset must show in the log-sum-exp"


def test_everything_at_once() -> None:
    case = make_case(
        key_bits=3.5, value_bits=3, key_dim=80, value_dim=100, queries=5, lengths=(64, 7, 64)
    )
    case.first_token = torch.randint(0, 90, (2, 5))
    case.options |= {
        "logit_offset": torch.randn(2, 4, 5),
        "softcap": 20.0,
        "mask": torch.rand(2, 1, 5, case.tokens) < 0.8,
    }
    check(case)


@pytest.mark.parametrize("tile_values", [1, 3 * 64 * 2 * 2 * 64])
def test_tiles_do_not_show(tile_values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "TILE_VALUES", tile_values)
    monkeypatch.setattr(reference, "QUERIES_PER_BLOCK", 2)
    case = make_case(queries=5, lengths=(64, 64, 3, 64, 64))
    case.first_token = torch.randint(0, 130, (2, 5))
    case.options["logit_offset"] = torch.randn(2, 4, 5)
    case.options["mask"] = torch.rand(2, 1, 5, case.tokens) < 0.5
    check(case)


def test_sequences_may_share_pages() -> None:
    case = make_case()
    case.table = case.table[:1].expand(2, -1)
    check(case)


def test_scales_beyond_float16() -> None:
    case = make_case(sharpness=1e-6)
    scales = torch.rand(case.keys.scales.shape) * 2e5
    case.keys.dense *= (scales / case.keys.scales.float())[..., None].double()
    case.keys.scales = encode_scale(scales)
    error = (case.run().lse - case.expected().lse.float()).abs().max()
    assert error < 1e-3  # of the scales' own rounding


def test_int32_tables() -> None:
    case = make_case()
    whole = case.run()
    case.table, case.first_token = case.table.int(), case.first_token.int()
    assert torch.equal(case.run().out, whole.out)


# ---------------------------------------------------------------- dense_attention


def dense_inputs(
    batch: int = 2, heads: int = 4, kv_heads: int = 2, queries: int = 5, tokens: int = 37
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    random = functools.partial(torch.randn, generator=generator)
    return (
        random(batch, heads, queries, 24),
        random(batch, kv_heads, tokens, 24),
        random(batch, kv_heads, tokens, 40),
    )


def check_dense(hidden: Tensor, positions: Tensor, own: Tensor, **options: Any) -> None:
    query, keys, values = dense_inputs(queries=len(own), tokens=positions.shape[1])
    got = dense_attention(query, keys, values, positions, own[None], scaling=0.3, **options)
    mask, softcap = options.get("mask"), options.get("softcap")
    if mask is not None:
        columns = positions.clamp(min=0)[:, None, None].expand(2, *mask.shape[1:3], -1)
        mask = mask.expand(2, -1, -1, -1).gather(-1, columns)
    plain, exact = (
        dense_softmax(
            query.to(dtype) * 0.3,
            keys.to(dtype),
            values.to(dtype),
            hidden[:, None],
            mask=mask,
            softcap=softcap,
        )
        for dtype in (torch.float32, torch.float64)
    )
    assert_as_accurate(got, plain, exact)


@pytest.mark.parametrize("logits_per_block", [1, 1 << 22])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 10])
def test_dense_attention_is_causal(
    window: int | None,
    softcap: float | None,
    logits_per_block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dense, "LOGITS_PER_BLOCK", logits_per_block)
    # Scattered positions, one token hidden, two queries before some tokens.
    positions = torch.stack([torch.randperm(60)[:37], torch.randperm(60)[:37]])
    positions[0, 5] = -1
    own = torch.tensor([0, 7, 30, 59, 59])
    tokens, queries = positions[:, None], own[None, :, None]
    hidden = (tokens < 0) | (tokens > queries)
    if window is not None:
        hidden = hidden | (tokens <= queries - window)
    check_dense(hidden, positions, own, sliding_window=window, softcap=softcap)


@pytest.mark.parametrize("additive", [False, True])
def test_dense_attention_with_a_mask(additive: bool) -> None:
    positions = torch.stack([torch.randperm(60)[:37], torch.randperm(60)[:37]])
    positions[1, :3] = -1
    mask: Tensor = torch.rand(2, 1, 5, 60) < 0.5
    mask[0, :, 1] = False
    if additive:
        mask = torch.where(mask, torch.randn(mask.shape), -torch.inf)
    check_dense((positions < 0)[:, None], positions, torch.arange(5), mask=mask)


def test_dense_attention_over_no_tokens_is_nothing() -> None:
    query, keys, values = dense_inputs(tokens=0)
    part = dense_attention(
        query,
        keys,
        values,
        torch.empty(1, 0, dtype=torch.int64),
        torch.arange(5)[None],
        scaling=1.0,
    )
    assert not part.out.any()
    assert part.lse.eq(-torch.inf).all()


# ---------------------------------------------------------------- exact_attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, 5, 37])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sliding_window": 9},
        {"sliding_window": 1000},
        {"softcap": 3.0},
        {"sink_logits": True},
        {"sink_logits": True, "softcap": 3.0, "sliding_window": 9},
        {"mask": True},
        {"mask": True, "softcap": 3.0},
        {"mask": True, "sliding_window": 9},
    ],
    ids=lambda options: "+".join(options) or "causal",
)
def test_exact_attention(dtype: torch.dtype, queries: int, options: dict[str, Any]) -> None:
    query, keys, values = (x.to(dtype) for x in dense_inputs(queries=queries))
    own, tokens = torch.arange(37 - queries, 37)[:, None], torch.arange(37)[None, :]
    allowed = tokens <= own
    if "mask" in options:
        mask = (torch.rand(2, 1, queries, 37) < 0.7) & allowed
        mask[..., 0] = True
        options = options | {"mask": mask}
        hidden = ~mask
    else:
        if "sliding_window" in options:
            allowed = allowed & (tokens > own - options["sliding_window"])
        hidden = ~allowed[None, None]
    sinks = torch.randn(4) if "sink_logits" in options else None
    got = exact_attention(query, keys, values, scaling=0.3, **options | {"sink_logits": sinks})
    softcap = options.get("softcap")
    results = []
    for wide in (dtype, torch.float64):
        part = dense_softmax(
            query.to(wide) * 0.3, keys.to(wide), values.to(wide), hidden, softcap=softcap
        )
        if sinks is not None:
            share = 1 + (sinks.to(wide)[None, :, None] - part.lse).exp()
            part = Partial(part.out / share[..., None], part.lse)
        results.append(part.out)
    plain, exact = results
    slack = 4 * torch.finfo(dtype).eps * exact.abs().max()
    error = (got.double() - exact).abs().max()
    assert got.dtype == dtype
    assert error <= 2 * (plain.double() - exact).abs().max() + slack


# ---------------------------------------------------------------- merging


def random_partial(seed: int, spread: float) -> Partial:
    generator = torch.Generator().manual_seed(seed)
    return Partial(
        torch.randn(2, 3, 4, 5, generator=generator),
        spread * torch.randn(2, 3, 4, generator=generator),
    )


@given(
    st.integers(0, 40),
    st.lists(st.integers(0, 5), min_size=40, max_size=40),
    st.floats(0.01, 30),
)
@settings(max_examples=50, deadline=None)
def test_any_split_of_the_tokens_merges_to_one_pass(
    tokens: int, owner: list[int], scaling: float
) -> None:
    query, keys, values = dense_inputs(tokens=tokens)
    positions, own = torch.arange(tokens)[None], torch.arange(tokens - 5, tokens)
    whole = dense_attention(query, keys, values, positions, own[None], scaling=scaling)
    part_of = torch.tensor(owner[:tokens], dtype=torch.int64)
    parts = []
    for number in range(6):
        mine = (part_of == number).nonzero().flatten()
        chosen = keys[:, :, mine], values[:, :, mine], positions[:, mine]
        parts.append(dense_attention(query, *chosen, own[None], scaling=scaling))
    merged = merge_partials(parts)
    # What rounding the logits does to the softmax, in units of the largest of them.
    noise = 8 * torch.finfo(torch.float32).eps * (1 + scaling * 24)
    torch.testing.assert_close(merged.lse, whole.lse, rtol=1e-6, atol=noise)
    torch.testing.assert_close(merged.out, whole.out, rtol=1e-5, atol=noise)


@given(st.integers(0, 2**31), st.floats(0.1, 1000))
@settings(max_examples=20, deadline=None)
def test_merging_is_associative_and_commutative(seed: int, spread: float) -> None:
    a, b, c = (random_partial(seed + i, spread) for i in range(3))
    left = merge_partials([merge_partials([a, b]), c])
    right = merge_partials([b, merge_partials([c, a])])
    torch.testing.assert_close(left.out, right.out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(left.lse, right.lse, rtol=1e-5, atol=1e-5)


def test_a_part_that_saw_nothing_changes_nothing() -> None:
    part = random_partial(0, 100.0)
    nothing = Partial(torch.zeros_like(part.out), torch.full_like(part.lse, -torch.inf))
    merged = merge_partials([nothing, part, nothing])
    assert torch.equal(merged.out, part.out)
    assert torch.equal(merged.lse, part.lse)
    empty = merge_partials([nothing, nothing])
    assert torch.equal(empty.out, nothing.out)
    assert torch.equal(empty.lse, nothing.lse)


def test_sink_logits_take_mass_and_give_nothing() -> None:
    part, sinks = random_partial(0, 3.0), torch.randn(3)
    got = with_sinks(part, sinks)
    share = torch.sigmoid(part.lse - sinks[None, :, None])
    torch.testing.assert_close(got.out, part.out * share[..., None])
    same = merge_partials([part, null_partial(part, sinks[None, :, None])])
    assert torch.equal(got.lse, same.lse)
    assert with_sinks(part, None) is part
