"""The study of chunks and key maps, at sizes that take no time."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks import key_map_chunks
from benchmarks.key_map_beginnings import study as beginnings
from benchmarks.key_map_chunks import study
from benchmarks.key_map_unseen import study as unseen
from sixfold.eval.perplexity import fill
from tests.tiny import tiny_model
from tools.render_results import (
    key_map_beginnings_table,
    key_map_chunks_table,
    key_map_unseen_table,
)

pytestmark = pytest.mark.usefixtures("unhooked")


def windows() -> Tensor:
    return torch.randint(2, 384, (3, 220), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_map_chunks, "FIT_TOKENS", 180)


def test_chunks_change_the_codes_of_fitted_maps_alone() -> None:
    found = fitted, at_once, pinned = study(tiny_model(), windows(), 200, 48)
    assert [row["map"] for row in found] == ["fitted", "at once", "pinned"]
    assert pinned["differing"] < 0.01 < 0.1 < min(fitted["differing"], at_once["differing"])
    assert all(0 < row["kl"]["4"] < row["kl"]["2"] for row in found)
    rows = [{"model": "tiny", **row} for row in found]
    table = key_map_chunks_table({"windows": [2, 220], "rows": rows})
    assert table.count("| tiny | chunks of 48 |") == 3
    assert "2 windows of 220 tokens" in table


def test_one_piece_is_what_others_are_compared_with() -> None:
    assert [row["differing"] for row in study(tiny_model(), windows(), 200, 0)] == [0, 0, 0]


def test_a_map_of_one_page_is_compared_with_that_of_more() -> None:
    rows = [{"model": "tiny", **row} for row in beginnings(tiny_model(), windows())]
    assert [row["fitted to"] for row in rows] == ["its own prompt", "64", "128"]
    kls = [row["kl"] for row in rows]
    assert all(kl > 0 for kl in kls)
    assert len(set(kls)) == 3
    table = key_map_beginnings_table({"windows": [2, 220], "rows": rows})
    assert "| 64 tokens of another |" in table
    assert "2 windows of 220 tokens" in table


def test_what_queries_are_taken_to_be_makes_other_maps() -> None:
    model = copy.deepcopy(tiny_model())
    for layer in model.base_model.layers:
        # Some channels loud, some silent.
        layer.self_attn.k_proj.weight.data[::3] *= 4
        layer.self_attn.k_proj.weight.data[1::3] /= 4
    rows = [{"model": "tiny", **row} for row in unseen(model, windows())]
    kls = [row["kl"]["2"] for row in rows]
    assert all(kl > 0 for kl in kls)
    assert len(set(kls)) == 4
    table = key_map_unseen_table({"windows": [3, 220], "rows": rows})
    assert "| tiny | seen |" in table
    assert "3 windows of 220 tokens" in table


@pytest.mark.parametrize(("chunk", "expected"), [(None, [20]), (8, [8, 8, 4])])
def test_a_prompt_is_filled_in_chunks(chunk: int | None, expected: list[int]) -> None:
    model, lengths = tiny_model(), []
    hook = model.base_model.register_forward_pre_hook(
        lambda _, __, options: lengths.append(options["input_ids"].shape[1]), with_kwargs=True
    )
    fill(model, windows()[0, :20], DynamicCache(config=model.config), chunk)
    hook.remove()
    assert lengths == expected
