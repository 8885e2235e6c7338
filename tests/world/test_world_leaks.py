"""Nothing gives answers away: not their frequencies, not the wording, not a single frame."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest

from foveate.world import TASKS, TEMPORAL_TASKS, Question, Scene, questions_of, sample_scene
from foveate.world.baselines import (
    Glimpse,
    blind_accuracy,
    glimpse,
    glimpses,
    guess_accuracy,
    single_frame_accuracy,
    wording,
)

#: What one frame cannot but show: a thing that is new or gone is one of few that it shows.
MOST = {"direction": 0.25, "order": 0.5, "when": 0.36, "needle": 0.17, "change": 0.33}
#: Movers lie in front of what stands still more often than not, and one frame may show that.
MOST["moving"] = 0.57


@pytest.fixture(scope="module")
def scenes() -> dict[str, list[Scene]]:
    names = ("train", "test")
    return {name: [sample_scene(f"0/{name}/{i}", 16) for i in range(2000)] for name in names}


@pytest.fixture(scope="module")
def questions(scenes: dict[str, list[Scene]]) -> dict[str, list[Question]]:
    return {name: [q for one in found for q in questions_of(one)] for name, found in scenes.items()}


def test_every_task_is_asked_often(questions: dict[str, list[Question]]) -> None:
    asked = Counter(question.task for question in questions["train"])
    assert asked.keys() == TASKS.keys() and min(asked.values()) > 500, asked


def test_answers_are_balanced(questions: dict[str, list[Question]]) -> None:
    found: dict[str, Counter[int]] = defaultdict(Counter)
    options: dict[str, int] = {}
    for question in questions["train"] + questions["test"]:
        text = wording(question.text)
        found[text][question.options.index(question.answer)] += 1
        options[text] = len(question.options)
    assert len(found) == 14
    for text, counts in found.items():
        total, kinds = counts.total(), options[text]
        if text.startswith("when"):  # a visit of five frames fits the middle a little more often
            assert all(abs(count / total - 1 / 3) < 0.05 for count in counts.values()), counts
            continue
        expected = total / kinds
        deviation = sum((counts[place] - expected) ** 2 / expected for place in range(kinds))
        assert deviation < kinds - 1 + 5 * (2 * (kinds - 1)) ** 0.5, (text, counts)


@pytest.mark.parametrize("frames", [24, 32])
def test_answers_are_balanced_in_longer_clips(frames: int) -> None:
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for index in range(900):
        for question in questions_of(sample_scene(f"length/{index}", frames)):
            if question.task in ("direction", "when", "moving"):
                found[question.task][question.answer] += 1
    assert len(found) == 3
    for counts in found.values():
        share = 1 / len(counts)
        assert all(abs(count / counts.total() - share) < 0.08 for count in counts.values()), counts


def test_the_wording_says_nothing(questions: dict[str, list[Question]]) -> None:
    accuracy = blind_accuracy(questions["train"], questions["test"])
    chance, asked = Counter(), Counter()
    for question in questions["test"]:
        chance[question.task] += question.chance
        asked[question.task] += 1
    assert accuracy.keys() == TASKS.keys()
    for task, share in accuracy.items():
        assert share < chance[task] / asked[task] + 0.05, (task, share)


def test_the_wording_is_what_is_left_without_names() -> None:
    assert wording("where is the red object?") == "where is the _?"
    assert wording("how many crosses are there?") == "how many _ are there?"
    assert wording("which comes first, the star or the ring?") == (
        "which comes first, the _ or the _?"
    )


def test_one_frame_says_nothing_about_time(scenes: dict[str, list[Scene]]) -> None:
    train, test = (glimpses(scenes[name][:1000]) for name in ("train", "test"))
    oracle, guess = single_frame_accuracy(train, test, steps=150), guess_accuracy(train, test)
    asked = Counter(one.question.task for one in test)
    assert oracle.keys() == guess.keys() == set(TEMPORAL_TASKS)
    for task in TEMPORAL_TASKS:
        margin = 2.5 * (0.25 / asked[task]) ** 0.5
        assert oracle[task] < MOST[task] + margin, (task, oracle[task])
        assert guess[task] < MOST[task] + margin, (task, guess[task])


def leaking(scene: Scene, question: Question) -> Glimpse:
    """A glimpse of the last frame for what moves, else of the first: a leak on purpose."""
    last = scene.sprites[question.about[0] - 1].role == "mover"
    one = glimpse(scene, question)
    frame = scene.frames - 1 if last else 0
    seen = tuple(sprite for sprite in scene.sprites if sprite.present(frame))
    return Glimpse(one.question, seen, tuple(s.center(frame, scene.frames) for s in seen))


def test_the_oracle_finds_a_leak_where_there_is_one(scenes: dict[str, list[Scene]]) -> None:
    # Were the frame always the last, the place of a thing would tell its direction.
    train, test = (
        [leaking(s, q) for s in scenes[name][:1000] for q in questions_of(s, tasks=("direction",))]
        for name in ("train", "test")
    )
    assert single_frame_accuracy(train, test)["direction"] > 0.5
