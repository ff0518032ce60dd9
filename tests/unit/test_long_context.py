"""Benchmarks of long contexts at short ones: the same code, in seconds."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import long_context, needles
from sixfold.cache import CachePolicy
from sixfold.codebooks import expected_mse
from sixfold.eval.embedded import haystack, load_embedded
from sixfold.eval.needles import split_sentences
from sixfold.integrations.transformers.keyword import CACHE_KEYWORD
from tools import long_context_tables

WIDTHS = (4, 2.5)


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_context, "CHUNK", 1024)
        return long_context.measure(5_000, WIDTHS, steps=1, bandwidth=1e10)


def test_the_oracle_is_attention_in_any_number_of_chunks() -> None:
    random = torch.Generator().manual_seed(0)
    size = long_context.KV_HEADS, len(long_context.DEPTHS) * long_context.GROUP
    queries = torch.randn(*size, long_context.HEAD_DIM, generator=random, dtype=torch.float64)
    keys, values = torch.randn(
        2, 1, long_context.KV_HEADS, 300, long_context.HEAD_DIM, generator=random
    )
    oracle = long_context.Oracle(queries)
    for part in (slice(0, 1), slice(1, 200), slice(200, 300)):
        oracle.see(keys[:, :, part], values[:, :, part])
    logits = queries @ keys[0].double().mT * long_context.SCALING
    exact = logits.softmax(-1) @ values[0].double()
    assert torch.allclose(oracle.output, exact, rtol=1e-12, atol=1e-14)


def test_needles_come_back_with_the_error_of_one_coded_value(measured: dict[str, Any]) -> None:
    for row in measured["rows"]:
        bits = CachePolicy.spending(row["bits"]).value_bits
        expected = math.sqrt(expected_mse(long_context.HEAD_DIM, bits))
        for part, count in (("whole", 3), ("half", 2)):
            assert row[part]["needles"] == count
            assert row[part]["error"] == pytest.approx(expected, rel=0.25)
            assert row[part]["needle_cosine"] > 1 - 2 * expected**2
        assert row["half"]["gone_cosine"] < 0.5


def test_bytes_are_those_of_the_width_and_halve(measured: dict[str, Any]) -> None:
    for row in measured["rows"]:
        ratio = measured["plain_nbytes"] / row["nbytes"]
        assert 0.75 * 16 / (row["bits"] + 0.125) < ratio < 16 / row["bits"]
        assert row["half_nbytes"] < 0.75 * row["nbytes"]


def test_both_tables_have_a_row_a_result(measured: dict[str, Any]) -> None:
    document = {**measured, "machine": {"processor": "any", "threads": 1}}
    assert long_context_tables.million(document).count("\n|") == len(WIDTHS) + 1


@pytest.mark.parametrize(
    ("tokens", "factor"), [(1_000, 1), (2_000, 2), (4_000, 4), (16_000, 16), (104_000, 128)]
)
def test_positions_are_stretched_by_twice_what_they_need(tokens: int, factor: int) -> None:
    assert needles.yarn_factor(tokens) == factor


def test_the_prefill_is_the_models_own() -> None:
    model, tokenizer = load_embedded()
    ids = torch.tensor(tokenizer(haystack(), verbose=False)["input_ids"][:300])
    ours = needles.prefill(model, ids)
    with torch.no_grad():
        exact = getattr(model(input_ids=ids[None], use_cache=True), CACHE_KEYWORD)
    for mine, theirs in zip(ours.layers, exact.layers, strict=True):
        assert torch.allclose(mine.keys, theirs.keys, atol=1e-4)
        assert torch.allclose(mine.values, theirs.values, atol=1e-4)


def test_long_text_repeats_no_order() -> None:
    sentences = split_sentences(haystack())
    text = needles.long_text(sentences, 20_000, needles.Random(0))
    first, second = text[: len(sentences)], text[len(sentences) : 2 * len(sentences)]
    assert sorted(first) == sorted(second) == sorted(sentences)
    assert first != second


def test_a_naive_two_bit_cache_fails_where_ours_does_not(tmp_path: Path) -> None:
    caches = needles.contenders([4], ["quanto-2"])
    rows = needles.measure(caches, [2_500], depths=(0.1, 0.5, 0.9))
    found = {row["cache"]: sum(row["found"]["2500"]) for row in rows}
    assert found["uncompressed"] == found["sixfold 4"] == 3
    assert found["quanto-2"] < 3
    document = {"rows": rows, "depths": [0.1, 0.5, 0.9], "factors": {"2500": 4.0}}
    assert long_context_tables.needles(document).count("\n|") == len(rows) + 1
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    needles.draw(document, tmp_path / "needles.png")
    assert 1_000 < (tmp_path / "needles.png").stat().st_size < 100_000
