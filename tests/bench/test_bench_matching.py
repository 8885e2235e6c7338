from __future__ import annotations

import pytest

from foveate.bench import is_correct
from foveate.bench.matching import choose, normalise


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("The Red Square.", "red square"),
        ("two", "2"),
        ("2", "Two"),
        ("It's  blue!", "blue"),
        ("The answer is: a dog", "dog"),
        ("Answer: 12", "twelve"),
        ("ASSISTANT: top-left", "top left"),
        ("Yes, it does.", "yes"),
        ("1.5", "1.5"),
        ("caf\u00e9\u0301"[:4], "CAF\u00c9"),
        ("\uff12", "2"),
        ("A", "a"),
        ("It is raining.", "it is raining"),
        ("raining", "It's raining"),
        ("It is", "it is"),
    ],
)
def test_right_replies(reply: str, answer: str) -> None:
    assert is_correct(reply, answer)


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("", "red"),
        ("red or blue", "red"),
        ("reddish", "red"),
        ("no, yes", "yes"),
        ("15", "1.5"),
        ("twenty one", "1"),
        ("not a dog", "dog"),
        ("eyes", "yes"),
    ],
)
def test_wrong_replies(reply: str, answer: str) -> None:
    assert not is_correct(reply, answer)


OPTIONS = ["red", "dark red", "a blue cross", "none"]


@pytest.mark.parametrize(
    ("reply", "chosen"),
    [
        ("A", 0),
        ("b.", 1),
        ("(C)", 2),
        ("B. dark red", 1),
        ("The answer is D", 3),
        ("The correct option is (b).", 1),
        ("Blue cross", 2),
        ("a blue cross", 2),
        ("it is the dark red one", 1),
        ("It is red", 0),
        ("red or blue cross", None),
        ("E", None),
        ("green", None),
        ("", None),
        ("a car", None),
    ],
)
def test_lettered_options_are_chosen_by_letter_or_text(reply: str, chosen: int | None) -> None:
    assert choose(reply, OPTIONS, lettered=True) == chosen


@pytest.mark.parametrize("reply", ["It is a dog.", "a dog", "B", "The answer is: it is a dog"])
def test_options_may_begin_like_a_lead_in(reply: str) -> None:
    options = ["It is a cat.", "It is a dog.", "It is a hot dog."]
    assert choose(reply, options, lettered=True) == 1
    assert is_correct(reply, options[1], options, lettered=True)


def test_letters_mean_nothing_where_none_were_offered() -> None:
    assert choose("B", OPTIONS) is None
    assert choose("b", ["c", "b"]) == 1
    # Where both would do, what was offered as a letter is read as one.
    assert choose("B", ["b", "c"], lettered=True) == 1


def test_regions_are_not_taken_for_their_parts() -> None:
    regions = ["top", "left", "top-left"]
    assert [choose(r, regions) for r in ("top-left", "top", "at the top left.")] == [2, 0, 2]


def test_articles_are_kept_where_nothing_else_is() -> None:
    assert normalise("The A") == "the a" and normalise("a dog") == "dog"
