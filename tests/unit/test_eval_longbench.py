"""LongBench: metrics by hand, files made here, answers scored by dataset and length."""

import json
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

import pytest

from sixfold.errors import SixfoldError
from sixfold.eval import longbench_metrics as metrics
from sixfold.eval.caches import compressed, uncompressed
from sixfold.eval.embedded import haystack
from sixfold.eval.longbench import (
    DATASETS,
    _prompt_ids,
    find_datasets,
    measure_longbench,
    prompt_of,
    score,
)
from tests.tiny import tiny_model, tiny_tokenizer


def question(answers: list[str], length: int = 100, **fields: Any) -> dict[str, Any]:
    text = haystack()[:600]
    asked = {"context": text, "input": "Who?", "answers": answers, "length": length}
    return asked | {"all_classes": None} | fields


@pytest.mark.parametrize(
    ("metric", "prediction", "reference", "points"),
    [
        # Two words of three and of two agree: 2·2 / (3 + 2).
        ("qa_f1", "The red, old house", "A Red house!", 0.8),
        ("qa_f1", "nothing", "else", 0.0),
        # Common subsequence "the cat sat": 3 of 5 and 3 of 4 words.
        ("rouge_l", "the cat now sat down", "the cat sat there", 2 * 3 / 9),
        ("rouge_l", "", "text", 0.0),
        ("count", "There are 3, no, 4", "4", 0.5),
        ("count", "none", "4", 0.0),
        ("retrieval", "Paragraph 12", "Paragraph 12", 1.0),
        ("retrieval", "Paragraph 1 or Paragraph 12", "Paragraph 12", 0.5),
        ("code_similarity", "\n# comment\nx = 1\ny = 2", "x = 1", 1.0),
        # 2·2 matching characters of 4 + 2.
        ("code_similarity", "ab", "abcd", 0.67),
        ("code_similarity", "# only a comment", "x", 0.0),
    ],
)
def test_metrics_by_hand(metric: str, prediction: str, reference: str, points: float) -> None:
    found = getattr(metrics, metric)(prediction, reference)
    assert found == pytest.approx(points, abs=1e-6)


def test_classes_named_share_the_point() -> None:
    classes = ["city", "capital city", "person", "date"]
    assert metrics.classification("A person.", "person", classes) == 1
    assert metrics.classification("A person or date", "person", classes) == 0.5
    assert metrics.classification("A date", "person", classes) == 0
    # "city" is part of what is right, and was not meant.
    assert metrics.classification("capital city", "capital city", classes) == 1


@pytest.mark.slow
def test_rouge_is_that_of_its_package() -> None:
    if find_spec("rouge") is None:
        pytest.skip("needs rouge, which nothing else here does")
    from rouge import Rouge

    rng = Random(0)
    for _ in range(200):
        one, other = (
            " ".join(rng.choices(["a", "b", "c", "d", ".", ". "], k=rng.randrange(1, 20)))
            for _ in range(2)
        )
        try:
            expected = Rouge().get_scores([one], [other], avg=True)["rouge-l"]["f"]
        except (ValueError, ZeroDivisionError):
            expected = 0.0
        assert metrics.rouge_l(one, other) == pytest.approx(expected, abs=1e-9)


def test_the_best_reference_counts_and_some_answers_end_with_their_line() -> None:
    assert score("qasper", "blue", question(["red", "blue"])) == 1
    assert score("triviaqa", "\nblue\nred", question(["red"])) == 0
    assert score("triviaqa", "\nblue\nred", question(["blue"])) == 1
    assert score("trec", "date", question(["date"], all_classes=["date", "place"])) == 1


@pytest.mark.parametrize("name", DATASETS)
def test_every_dataset_has_a_prompt_with_its_parts(name: str) -> None:
    prompt = prompt_of(name, {"context": "CONTEXT {input}", "input": "INPUT"})
    assert "CONTEXT {input}" in prompt
    asks = name not in {"gov_report", "multi_news", "passage_count", "lcc"}
    assert ("INPUT" in prompt) == asks


def test_long_prompts_lose_their_middle() -> None:
    tokenizer = tiny_tokenizer()
    whole = _prompt_ids(tokenizer, "gov_report", question([""]), 10_000, False).tolist()
    cut = _prompt_ids(tokenizer, "gov_report", question([""]), 60, False).tolist()
    assert len(whole) > 100
    assert tokenizer.decode(cut) == tokenizer.decode(whole[:30]) + tokenizer.decode(whole[-30:])


def test_files_are_found_answered_and_scored(tmp_path: Path) -> None:
    rows = [question(["yes"], 100), question([""], 9000)]
    text = "\n".join(json.dumps(row) for row in rows) + "\n"
    (tmp_path / "passage_count.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "lcc_e.jsonl").write_text(json.dumps(question(["x"])), encoding="utf-8")
    data = find_datasets(tmp_path)
    assert {name: len(found) for name, found in data.items()} == {"passage_count": 2, "lcc": 1}
    seen: list[tuple[int, int, str]] = []
    found = measure_longbench(
        tiny_model(),
        tiny_tokenizer(),
        data,
        {"16": uncompressed, "8": compressed(8)},
        max_tokens=200,
        questions=2,
        progress=lambda *step: seen.append(step),
    )
    assert seen == [(step, 6, "16" if step % 2 else "8") for step in range(1, 7)]
    counted = found["passage_count"]["16"]
    assert counted.asked == 2
    assert counted.by_length["0-4k"] is not None
    assert counted.by_length["4-8k"] is None
    assert counted.by_length["8k+"] is not None
    assert 0 <= found["lcc"]["8"].score <= 100


def test_answers_are_what_the_model_says() -> None:
    ids = _prompt_ids(tiny_tokenizer(), "lcc", question([""]), 300, False)
    model: Any = tiny_model()
    out = model.generate(ids[None], max_new_tokens=64, do_sample=False)
    said = tiny_tokenizer().decode(out[0, len(ids) :], skip_special_tokens=True)
    line = next((x for x in said.lstrip("\n").split("\n") if not set("`#") & set(x)), "")
    data = {"lcc": [question([line])]}
    found = measure_longbench(
        tiny_model(), tiny_tokenizer(), data, {"16": uncompressed}, max_tokens=300
    )
    assert found["lcc"]["16"].score == (100 if line and "//" not in line else 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "line 1, is not a JSON object"),
        ('{"input": "x"}', "line 1, lacks answers, context, length"),
    ],
)
def test_foreign_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(SixfoldError, match="holds no LongBench data"):
        find_datasets(tmp_path)
    (tmp_path / "qasper_e.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(SixfoldError, match=message):
        find_datasets(tmp_path)
