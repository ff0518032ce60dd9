"""The needle documents: what is hidden is there once, where it should be, and can be scored."""

from importlib import resources
from random import Random

import pytest

from sixfold.eval.needles import (
    DIGITS,
    NAMES,
    Needle,
    document,
    hide,
    is_exact,
    make_needles,
    split_sentences,
)

SENTENCES = [" One fish swam.", " Two birds sang!", "\n\nThree dogs slept?", " Four men rowed."]


def haystack() -> str:
    """Return the prose shipped with the package."""
    return resources.files("sixfold.eval").joinpath("haystack.txt").read_text(encoding="utf-8")


def test_statement_is_cue_then_answer_then_full_stop() -> None:
    needle = Needle("Miriam", 48213)
    assert needle.cue == "The secret number of Miriam is"
    assert needle.answer == " 48213"
    assert needle.statement == "The secret number of Miriam is 48213."


def test_names_are_many_different_single_words() -> None:
    assert len(NAMES) >= 100
    assert len(set(NAMES)) == len(NAMES)
    assert all(name.isalpha() and name.istitle() for name in NAMES)


def test_needles_differ_in_name_and_number() -> None:
    needles = make_needles(Random(0), 50)
    assert len({n.name for n in needles}) == 50
    assert len({n.number for n in needles}) == 50
    assert all(len(str(n.number)) == DIGITS for n in needles)


def test_the_same_seed_makes_the_same_needles() -> None:
    assert make_needles(Random(3), 8) == make_needles(Random(3), 8)
    assert make_needles(Random(3), 8) != make_needles(Random(4), 8)


def test_names_can_be_given() -> None:
    assert {n.name for n in make_needles(Random(0), 2, ["Ann", "Bob"])} == {"Ann", "Bob"}


def test_asking_for_more_needles_than_names_is_refused() -> None:
    with pytest.raises(ValueError, match="larger than population"):
        make_needles(Random(0), 3, ["Ann", "Bob"])


def test_splitting_loses_nothing() -> None:
    text = haystack().strip()
    assert "".join(split_sentences(text)) == text


def test_splitting_ends_sentences_at_their_marks_and_quotes() -> None:
    text = 'He said "No." She left!\n\nWas it late? It was 3.5 miles'
    assert split_sentences(text) == [
        'He said "No."',
        " She left!",
        "\n\nWas it late?",
        " It was 3.5 miles",
    ]


@pytest.mark.parametrize("text", ["", "  \n "])
def test_blank_text_has_no_sentences(text: str) -> None:
    assert split_sentences(text) == []


@pytest.mark.parametrize(("depth", "before"), [(0.0, 0), (0.25, 1), (0.5, 2), (0.75, 3), (1.0, 4)])
def test_depth_is_the_share_of_sentences_before_the_needle(depth: float, before: int) -> None:
    needle = Needle("Ada", 12345)
    head, tail = hide(SENTENCES, [needle], [depth]).split(needle.statement)
    assert len(split_sentences(head)) == before
    assert len(split_sentences(tail)) == len(SENTENCES) - before


def test_hiding_leaves_the_haystack_as_it_was() -> None:
    needles = make_needles(Random(1), 3)
    text = hide(SENTENCES, needles, [0.9, 0.3, 0.5])
    for needle in needles:
        assert text.count(needle.statement) == 1
        text = text.replace(f" {needle.statement}", "")
    assert text == "".join(SENTENCES).strip()


def test_needles_of_one_depth_are_all_hidden() -> None:
    needles = make_needles(Random(2), 4)
    text = hide(SENTENCES, needles, [0.5] * 4)
    assert all(needle.statement in text for needle in needles)


@pytest.mark.parametrize("depth", [-0.1, 1.1])
def test_a_depth_outside_the_haystack_is_refused(depth: float) -> None:
    with pytest.raises(ValueError, match="depths must lie in"):
        hide(SENTENCES, [Needle("Ada", 12345)], [depth])


def test_every_needle_needs_a_depth() -> None:
    with pytest.raises(ValueError, match="longer"):
        hide(SENTENCES, make_needles(Random(0), 2), [0.5])


def test_a_document_asks_for_one_needle_and_does_not_answer() -> None:
    needles = make_needles(Random(5), 3)
    text = document(SENTENCES, needles, [0.2, 0.5, 0.8], needles[1])
    assert text.endswith(f"\n\n{needles[1].cue}")
    assert text.count(needles[1].cue) == 2
    assert text.count(needles[1].answer) == 1


@pytest.mark.parametrize(
    ("continuation", "exact"),
    [
        (" 48213.", True),
        (" 48213", True),
        ("48213 and more", True),
        (" 4821", False),
        (" 482130", False),
        (" 48214.", False),
        (" not 48213", False),
        ("", False),
    ],
)
def test_only_every_digit_and_no_more_is_exact(continuation: str, exact: bool) -> None:
    assert is_exact(continuation, Needle("Ada", 48213)) is exact


def test_the_shipped_haystack_is_long_and_does_not_repeat_itself() -> None:
    text = haystack()
    assert len(text) >= 15_000
    long = [s.strip() for s in split_sentences(text) if len(s) > 40]
    assert len(long) == len(set(long))
    assert "secret number" not in text
