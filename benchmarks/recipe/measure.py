"""Measure one study on one model."""

from itertools import groupby
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from benchmarks.evaluate import bits_held
from benchmarks.recipe.models import CALIBRATION_TOKENS, MODELS
from benchmarks.recipe.studies import PREFILL, STUDIES, Case
from benchmarks.with_layers import with_layers
from sixfold.eval.caches import MakeCache, compressed, uncompressed
from sixfold.eval.embedded import haystack
from sixfold.eval.niah import Retrieval, retrieve
from sixfold.eval.perplexity import CacheComparison, compare_caches, windows_of

TOKENS, WINDOWS, CHUNK = 2 * PREFILL, 7, 64
NEEDLE_TOKENS, NEEDLES, DOCUMENTS = 1024, 16, 36


def measure(study: str, name: str) -> list[dict[str, Any]]:
    """Every case of one study on one model."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, tokenizer = MODELS[name]()
    found: list[tuple[Case, CacheComparison]] = []
    for _, group in groupby(STUDIES[study].cases, lambda case: case.change):
        found += _compare(model, tokenizer, list(group))
    rows, base = [], dict[float, CacheComparison]()
    for case, result in found:
        first = base.setdefault(case.bits, result)
        held = bits_held(model.config, case.bits, case.settings)
        rows.append(row_of(name, case.label, case.bits, held, result, first))
    if STUDIES[study].needles:
        cases = [case for case, _ in found]
        rows = _with_needles(model, tokenizer, cases, rows)
    return rows


def row_of(
    model: str, case: str, bits: float, held: float, result: CacheComparison, first: CacheComparison
) -> dict[str, Any]:
    """A row of a table.

    Args:
        model: Its name.
        case: What is special about it.
        bits: Its width.
        held: Bits a value at `LONG_CONTEXT` tokens, everything counted.
        result: What was found.
        first: What was found for the case that others of this width are measured against.
    """
    difference = result.kl_difference(first)
    change = {
        "mean": difference.mean / first.kl.mean,
        "half_width": (difference.half_width or 0.0) / first.kl.mean,
    }
    shown = {"model": model, "case": case, "bits": bits, "bits_long": held}
    return {**shown, **result.to_dict(), "kl_change": change}


def _compare(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cases: list[Case]
) -> list[tuple[Case, CacheComparison]]:
    windows = windows_of(tokenizer, haystack(), TOKENS, WINDOWS)
    change = cases[0].change
    changed = model if change is None else change(model, windows.flatten()[:CALIBRATION_TOKENS])
    found = compare_caches(changed, windows, _caches(cases), prefill=PREFILL, chunk=CHUNK)
    return list(zip(cases, found.values(), strict=True))


def _with_needles(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: list[Case],
    rows: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """The rows with the needles they find, and a row for the uncompressed cache."""
    found = retrieve(
        model,
        tokenizer,
        haystack(),
        {"uncompressed": uncompressed, **_caches(cases)},
        lengths=[NEEDLE_TOKENS],
        depths=[index / (NEEDLES - 1) for index in range(NEEDLES)],
        documents=DOCUMENTS,
        forced=True,
    )
    exact, *others = (_counts(one) for one in found.values())
    plain = {"model": rows[0]["model"], "case": "uncompressed", "bits": 16, "bits_long": 16.0}
    return [plain | exact, *(row | counts for row, counts in zip(rows, others, strict=True))]


def _caches(cases: list[Case]) -> dict[str, MakeCache]:
    return {
        f"{one.bits} {one.label}": with_layers(compressed(one.bits, **one.settings), one.variant)
        for one in cases
    }


def _counts(found: Retrieval) -> dict[str, int]:
    return {"needles_asked": found.asked, "needles_exact": found.exact}
