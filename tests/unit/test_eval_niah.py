"""Needle retrieval: documents are what they claim, and answers are counted where they belong."""

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from sixfold.errors import SixfoldError
from sixfold.eval import niah
from sixfold.eval.caches import compressed, fork, held_bytes, uncompressed
from sixfold.eval.embedded import haystack, load_embedded
from sixfold.eval.needles import split_sentences
from tests.tiny import tiny_model, tiny_tokenizer

DEPTHS = (0.0, 0.5, 1.0)


def questions(tokens: int = 700, seed: int = 0) -> niah.Questions:
    sentences = split_sentences(haystack())
    return niah.build_questions(tiny_tokenizer(), sentences, DEPTHS, tokens, Random(seed))


@pytest.mark.parametrize("seed", range(5))
def test_documents_have_the_length_asked_for(seed: int) -> None:
    one = questions(700, seed)
    sizes = [len(one.context) + len(tail) for tail in one.tails]
    # A document ends with a whole sentence, and none of this text has 200 tokens.
    assert all(500 < size <= 700 for size in sizes)


def test_context_and_question_are_the_document() -> None:
    one = questions()
    text = str(tiny_tokenizer().decode(one.context))
    for needle, tail in zip(one.needles, one.tails, strict=True):
        assert text.count(needle.statement) == 1
        assert len(tail) > 0
        whole = str(tiny_tokenizer().decode(torch.cat([one.context, tail])))
        assert whole.endswith(needle.cue)
    places = [text.index(needle.statement) / len(text) for needle in one.needles]
    assert places == sorted(places)
    assert places[0] == 0
    assert 0.3 < places[1] < 0.7
    assert places[2] > 0.9


def test_same_seed_same_questions() -> None:
    assert torch.equal(questions(seed=1).context, questions(seed=1).context)
    assert not torch.equal(questions(seed=1).context[:50], questions(seed=2).context[:50])


def test_greedy_is_what_generate_does() -> None:
    ids = questions().context[:200]
    model: Any = tiny_model()
    expected = model.generate(ids[None], max_new_tokens=6, do_sample=False)[0, 200:]
    found = niah.greedy(model, ids, uncompressed(model), 6)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("make_cache", [uncompressed, compressed(8)])
def test_questions_leave_the_filled_cache_alone(
    make_cache: Callable[[PreTrainedModel], Cache],
) -> None:
    model, cache = tiny_model(), make_cache(tiny_model())
    niah.greedy(model, questions().context, cache, 1)
    length, held = cache.get_seq_length(), held_bytes(cache)
    first = niah.greedy(model, torch.tensor([5]), fork(cache), 8)
    again = niah.greedy(model, torch.tensor([5]), fork(cache), 8)
    assert torch.equal(first, again)
    assert (cache.get_seq_length(), held_bytes(cache)) == (length, held)


def test_answers_are_counted_by_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[str] = []
    build = niah.build_questions

    def remember(*arguments: object) -> niah.Questions:
        one = build(*arguments)  # type: ignore[arg-type]
        # Right at depth 0, one digit too many in the middle, wrong at the end.
        first, second, third = (str(needle.number) for needle in one.needles)
        answers.extend([f" {first}.", f" {second}0", f" {int(third) - 1}"])
        return one

    def answer(*_: object) -> Tensor:
        ids: Tensor = tiny_tokenizer()(answers.pop(0), return_tensors="pt")["input_ids"][0]
        return ids

    monkeypatch.setattr(niah, "build_questions", remember)
    monkeypatch.setattr(niah, "greedy", answer)
    found = niah.retrieve(
        tiny_model(),
        tiny_tokenizer(),
        haystack(),
        {"one": uncompressed},
        lengths=[500, 700],
        depths=DEPTHS,
        documents=2,
    )["one"]
    assert not answers
    assert (found.asked, found.exact) == (12, 4)
    assert [(c.tokens, c.depth, c.asked, c.exact) for c in found.cells] == [
        (size, depth, 2, 2 if depth == 0 else 0) for size in (500, 700) for depth in DEPTHS
    ]
    assert found.to_dict()["cells"][0]["tokens"] == 500


def test_texts_and_documents_too_short_are_refused() -> None:
    with pytest.raises(SixfoldError, match="the text has 4 tokens, too few to fill"):
        niah.build_questions(tiny_tokenizer(), ["One."], DEPTHS, 700, Random(0))
    with pytest.raises(SixfoldError, match=r"60 tokens are too short .* at least \d+ are needed"):
        questions(60)


@pytest.mark.parametrize("depths", [(), (0.5, 1.5), (0.5,) * 500])
def test_impossible_depths_are_refused(depths: tuple[float, ...]) -> None:
    with pytest.raises(SixfoldError, match=r"expected 1 to \d+ depths from 0 to 1"):
        niah.retrieve(tiny_model(), tiny_tokenizer(), "", {}, lengths=[500], depths=depths)


def test_forced_answers_count_as_decoded_ones_do() -> None:
    # The embedded model finds some needles of so many at one bit, and misses others.
    model, tokenizer = load_embedded()
    caches = {"1": compressed(1, sink_tokens=0, recent_window=0), "16": uncompressed}
    depths = [index / 15 for index in range(16)]
    forced, decoded = (
        niah.retrieve(
            model, tokenizer, haystack(), caches, lengths=[768], depths=depths, forced=forced
        )
        for forced in (True, False)
    )
    assert [cell.exact for cell in forced["16"].cells] == [c.exact for c in decoded["16"].cells]
    assert 0 < forced["1"].exact < 16
    assert abs(forced["1"].exact - decoded["1"].exact) <= 1
