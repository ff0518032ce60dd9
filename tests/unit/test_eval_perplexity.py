"""Comparing caches: the numbers are those of the model, and less precision costs more."""

import dataclasses
import math

import pytest
import torch

from sixfold.errors import SixfoldError
from sixfold.eval.caches import compressed, uncompressed
from sixfold.eval.embedded import haystack
from sixfold.eval.estimate import Estimate
from sixfold.eval.perplexity import CacheComparison, compare_caches, windows_of
from tests.tiny import tiny_model, tiny_tokenizer

PREFILL = 150
WIDTHS = (8, 4, 2)


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return windows_of(tiny_tokenizer(), haystack(), 300, count=2)


@pytest.fixture(scope="module")
def found(windows: torch.Tensor) -> dict[str, CacheComparison]:
    caches = {f"{width}": compressed(width) for width in WIDTHS}
    return compare_caches(
        tiny_model(), windows, {"same": uncompressed, **caches}, prefill=PREFILL, chunk=64
    )


def test_perplexity_is_that_of_one_forward_pass(
    windows: torch.Tensor, found: dict[str, CacheComparison]
) -> None:
    with torch.no_grad():
        logits = tiny_model()(windows, use_cache=False).logits
    scored, targets = logits[:, PREFILL:-1], windows[:, PREFILL + 1 :]
    loss = torch.nn.functional.cross_entropy(scored.flatten(0, 1), targets.flatten())
    assert found["same"].scored_tokens == targets.numel()
    assert found["same"].uncompressed_perplexity == pytest.approx(math.exp(loss), rel=1e-4)


def test_uncompressed_cache_differs_from_itself_in_nothing(
    found: dict[str, CacheComparison],
) -> None:
    same = found["same"]
    assert same.perplexity == same.uncompressed_perplexity
    assert same.kl.mean == same.kl_p99 == same.nll_increase.mean == 0
    assert same.top1_agreement.mean == 1
    # The model is in float32, which takes twice the 16-bit bytes.
    assert same.compression_ratio == 0.5


def test_fewer_bits_cost_more_and_hold_less(found: dict[str, CacheComparison]) -> None:
    kl = [found[f"{width}"].kl.mean for width in WIDTHS]
    assert 0 < kl[0] < kl[1] < kl[2]
    assert kl[0] < 0.1 * kl[2]
    sizes = [found[f"{width}"].nbytes for width in WIDTHS]
    assert sizes[0] > sizes[1] > sizes[2]
    assert found["2"].kl_p99 > found["2"].kl.mean
    assert found["8"].top1_agreement.mean > found["2"].top1_agreement.mean


def test_perplexity_and_loss_increase_agree(found: dict[str, CacheComparison]) -> None:
    two = found["2"]
    ratio = math.log(two.perplexity / two.uncompressed_perplexity)
    assert two.nll_increase.mean == pytest.approx(ratio, abs=1e-9)
    assert two.perplexity_change.mean == pytest.approx(math.expm1(ratio), rel=0.1)


@pytest.mark.parametrize("partial", [True, False])
def test_an_interrupt_leaves_what_was_measured(
    windows: torch.Tensor, found: dict[str, CacheComparison], partial: bool
) -> None:
    def interrupt(done: int, total: int, name: str) -> None:
        if done > total * 0.8:
            raise KeyboardInterrupt

    def read(count: int) -> CacheComparison:
        caches = {"2": compressed(2)}
        options = {"prefill": PREFILL, "progress": interrupt, "partial": partial}
        return compare_caches(tiny_model(), windows[:count], caches, **options)["2"]

    if partial:
        assert read(2).windows == 1
        assert read(2).kl_by_window == found["2"].kl_by_window[:1]
    for count in (1,) if partial else (1, 2):
        with pytest.raises(KeyboardInterrupt):
            read(count)


def test_progress_counts_up_to_the_total(windows: torch.Tensor) -> None:
    seen: list[tuple[int, int, str]] = []
    compare_caches(
        tiny_model(),
        windows,
        {"same": uncompressed},
        prefill=PREFILL,
        progress=lambda *step: seen.append(step),
    )
    # Of two windows and caches: one prefill, then 149 predictions in chunks of 64.
    names = ["uncompressed", "same"] * 8
    assert seen == [(step, 16, name) for step, name in enumerate(names, 1)]


def test_estimate_is_mean_and_standard_error() -> None:
    estimate = Estimate.over(torch.tensor([1.0, 2.0, 6.0]))
    assert estimate.mean == pytest.approx(3)
    assert estimate.standard_error == pytest.approx(math.sqrt(7 / 3))
    # Student's t with two degrees of freedom.
    assert estimate.half_width == pytest.approx(4.303 * math.sqrt(7 / 3))
    single = Estimate.over(torch.tensor([1.0]))
    assert single.standard_error is single.half_width is None


@pytest.mark.parametrize(("windows", "quantile"), [(12, 2.201), (31, 2.042), (10_000, 1.960)])
def test_intervals_of_many_windows_come_from_students_t(windows: int, quantile: float) -> None:
    values = torch.linspace(0, 1, windows)
    estimate = Estimate.over(values)
    assert estimate.half_width is not None
    assert estimate.standard_error is not None
    assert estimate.half_width / estimate.standard_error == pytest.approx(quantile, abs=1e-3)


def test_intervals_hold_the_mean_as_often_as_they_say() -> None:
    samples = torch.randn((4000, 5), generator=torch.Generator().manual_seed(0))
    held = [abs(one.mean) < (one.half_width or 0) for one in map(Estimate.over, samples)]
    assert sum(held) / len(held) == pytest.approx(0.95, abs=0.015)


def test_differences_are_paired_by_window(found: dict[str, CacheComparison]) -> None:
    two, eight = found["2"], found["8"]
    expected = [a - b for a, b in zip(two.kl_by_window, eight.kl_by_window, strict=True)]
    difference = two.kl_difference(eight)
    assert difference.mean == pytest.approx(sum(expected) / 2)
    assert difference.mean == pytest.approx(two.kl.mean - eight.kl.mean)
    assert difference.half_width != two.kl.half_width
    other = dataclasses.replace(eight, kl_by_window=(0.0,))
    with pytest.raises(SixfoldError, match="got 2 and 1 of them"):
        two.kl_difference(other)


def test_windows_do_not_overlap() -> None:
    ids = tiny_tokenizer()(haystack())["input_ids"]
    windows = windows_of(tiny_tokenizer(), haystack(), 100)
    assert windows.flatten().tolist() == ids[: windows.numel()]
    assert len(ids) - windows.numel() < 100
    assert len(windows_of(tiny_tokenizer(), haystack(), 100, count=3)) == 3


def test_short_text_and_long_prefill_are_refused(windows: torch.Tensor) -> None:
    with pytest.raises(SixfoldError, match="fewer than one window of 100"):
        windows_of(tiny_tokenizer(), "Too short.", 100)
    with pytest.raises(SixfoldError, match=r"expected 1 to 298 .* got 299"):
        compare_caches(tiny_model(), windows, {}, prefill=299)
