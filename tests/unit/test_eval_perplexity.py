"""Comparing caches: the numbers are those of the model, and less precision costs more."""

import math

import pytest
import torch

from sixfold.errors import SixfoldError
from sixfold.eval.caches import compressed, uncompressed
from sixfold.eval.embedded import haystack
from sixfold.eval.perplexity import CacheComparison, Estimate, compare_caches, windows_of
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


def test_progress_counts_up_to_the_total(windows: torch.Tensor) -> None:
    seen: list[tuple[int, int]] = []
    compare_caches(
        tiny_model(),
        windows,
        {"same": uncompressed},
        prefill=PREFILL,
        progress=lambda done, total: seen.append((done, total)),
    )
    # Per window one prefill, then 149 predictions in chunks of 64.
    assert seen == [(step, 8) for step in range(1, 9)]


def test_estimate_is_mean_and_standard_error() -> None:
    estimate = Estimate.over(torch.tensor([1.0, 2.0, 6.0]))
    assert estimate.mean == pytest.approx(3)
    assert estimate.standard_error == pytest.approx(math.sqrt(7 / 3))
    assert Estimate.over(torch.tensor([1.0])).standard_error is None


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
