"""Retrieval tasks: the facts are there, the answers follow from them, and scoring is strict."""

import re
from random import Random

import pytest

from sixfold.errors import SixfoldError
from sixfold.eval import embedded
from sixfold.eval.caches import compressed, uncompressed
from sixfold.eval.needles import split_sentences
from sixfold.eval.ruler import (
    TASKS,
    _document,
    found_share,
    measure_retrieval,
    multi_key,
    multi_value,
    variable_tracking,
)
from tests.tiny import tiny_model, tiny_tokenizer


def test_multi_key_asks_for_one_of_four() -> None:
    puzzle = multi_key(Random(0))
    matching = [fact for fact in puzzle.facts if fact.startswith(puzzle.cue)]
    assert len(puzzle.facts) == len(set(puzzle.facts)) == 4
    assert [fact[len(puzzle.cue) :] for fact in matching] == [f" {puzzle.answers[0]}."]


def test_multi_value_asks_for_all_numbers_of_one_name() -> None:
    puzzle = multi_value(Random(0))
    assert len(set(puzzle.answers)) == 4
    (name,) = {re.search(r"number of (\w+) is", fact)[1] for fact in puzzle.facts}
    assert name in puzzle.cue
    assert [re.search(r"\d+", fact)[0] for fact in puzzle.facts] == list(puzzle.answers)


def test_variables_form_a_chain_that_ends_in_the_number() -> None:
    for seed in range(20):
        puzzle = variable_tracking(Random(seed))
        value: dict[str, str] = {}
        for fact in puzzle.facts:
            name, assigned = re.fullmatch(r"VAR (\w+) = (?:VAR )?(\w+)\.", fact).groups()
            value[name] = value.get(assigned, assigned)
        (number,) = set(value.values())
        assert number in puzzle.cue
        assert set(value) == set(puzzle.answers)
        assert len(puzzle.answers) == 5


def test_only_whole_words_count() -> None:
    assert found_share(" 12345, and 678901.", ["12345", "67890"]) == 0.5
    assert found_share(" ABC = ABD", ["ABC", "ABD"]) == 1
    assert found_share("", ["ABC"]) == 0


@pytest.mark.parametrize("task", TASKS)
def test_documents_hide_every_fact_in_order_and_end_in_the_cue(task: str) -> None:
    rng, tokenizer = Random(1), tiny_tokenizer()
    puzzle = TASKS[task](rng)
    sentences = split_sentences(embedded.haystack())
    context, tail = _document(tokenizer, sentences, puzzle, 600, rng)
    assert 400 < len(context) + len(tail) <= 600
    text = tokenizer.decode([*context, *tail])
    places = [text.index(fact) for fact in puzzle.facts]
    assert places == sorted(places)
    assert text.endswith(f"\n\n{puzzle.cue}")
    assert puzzle.facts[-1] in tokenizer.decode(context)
    assert f"\n\n{puzzle.cue}" not in tokenizer.decode(context)


def test_the_embedded_model_finds_keys_through_codes() -> None:
    model, tokenizer = embedded.load_embedded()
    caches = {"16": uncompressed, "4": compressed(4)}
    text = embedded.haystack()
    options = {"tasks": ["multikey"], "tokens": 700, "documents": 2}
    found = measure_retrieval(model, tokenizer, text, caches, **options)["multikey"]
    assert found["16"].exact == found["4"].exact == found["4"].asked == 2
    assert found["4"].recall == 1
    assert found["4"].bits_per_value < found["16"].bits_per_value == 32


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(SixfoldError, match="no task 'sums'; expected some of multikey, multivalue"):
        measure_retrieval(tiny_model(), tiny_tokenizer(), "", {}, tasks=["sums"])
