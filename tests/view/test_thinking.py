"""Thinking in parts: what every part is asked, what the whole is asked, and what is kept of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checkpoints import save_checkpoint

import foveate
from foveate.checkpoints import load_model, sample_frames
from foveate.errors import FrameRequestError
from foveate.video import Clip
from foveate.view import answer as answering
from foveate.view import thinking
from foveate.view.thinking import DESCRIBE, Thought, join_thoughts, think

QUESTION = "what is in the video"


def clip(num: int = 30, fps: float = 1.0) -> Clip:
    level = (8 * torch.arange(num)).to(torch.uint8)[:, None, None, None]
    return Clip(level.expand(-1, 3, 40, 64).clone(), fps=fps)


class Late:
    """The later, the better; remembers what it was asked."""

    size, probabilities = (4, 4), True

    def __init__(self) -> None:
        self.asked: set[str] = set()

    def relevance(self, pixels_T3hw: torch.Tensor, question: str) -> torch.Tensor:
        self.asked.add(question)
        return pixels_T3hw.float().mean((1, 2, 3)) / 255


@pytest.fixture(scope="module")
def onevision(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_model(save_checkpoint("llava_onevision", tmp_path_factory.mktemp("think")))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Every call of `ask`, which runs as it is."""
    calls: list[dict[str, Any]] = []

    def noting(model: Any, processor: Any, source: Any, question: str, *rest: Any, **options: Any):
        found = answering.ask(model, processor, source, question, *rest, **options)
        calls.append({"source": source, "question": question, "answer": found, **options})
        return found

    monkeypatch.setattr(thinking, "ask", noting)
    return calls


def test_parts_first_then_the_whole(onevision: Any, asked: list[dict[str, Any]]) -> None:
    told: list[Thought] = []
    video = clip(30)
    found = think(
        *onevision,
        video,
        QUESTION,
        "divprune",
        retain=0.5,
        frames=4,
        thought_tokens=5,
        max_new_tokens=3,
        on_thought=told.append,
    )
    assert [(thought.start, thought.end) for thought in found.thoughts] == [(0, 15), (15, 30)]
    assert told == list(found.thoughts)
    first, second, last = asked
    assert QUESTION in first["question"] and "from 0 s to 15 s" in first["question"]
    assert "from 15 s to 30 s" in second["question"]
    assert (len(first["source"]), len(second["source"])) == (15, 15)
    assert [call["max_new_tokens"] for call in asked] == [5, 5, 3]
    assert found.thoughts[0].answer.new_tokens == 5 and found.new_tokens == 3
    # The whole, with the thoughts in front of the question.
    joined = f"From 0 s to 15 s: {told[0].text} From 15 s to 30 s: {told[1].text}"
    assert last["question"] == found.asked == f"<think>{joined}</think>{QUESTION}"
    assert last["source"] is video
    again = answering.ask(
        *onevision, clip(30), found.asked, "divprune", retain=0.5, frames=4, max_new_tokens=3
    )
    assert again.text == found.text
    # Reports of all, in the seconds of the whole video.
    (of_first,), (of_second,), (of_all,) = (
        answer.report.items for answer in (*(t.answer for t in told), found)
    )
    assert of_first.after < of_first.before
    assert of_first.seconds == [0, 4, 9, 14] and of_second.seconds == [15, 19, 24, 29]
    assert of_all.seconds == [0, 9, 19, 29]


def test_the_released_form_knows_neither_question_nor_times(
    onevision: Any, asked: list[dict[str, Any]]
) -> None:
    found = think(
        *onevision, clip(), QUESTION, generic=True, frames=3, thought_tokens=4, max_new_tokens=2
    )
    assert [call["question"] for call in asked[:2]] == [DESCRIBE, DESCRIBE]
    texts = [thought.text for thought in found.thoughts]
    assert all(texts) and found.asked == f"<think>{' '.join(texts)}</think>{QUESTION}"


def test_how_many_parts(onevision: Any) -> None:
    options: dict[str, Any] = {"frames": 2, "thought_tokens": 1, "max_new_tokens": 1}
    for fps, parts, expected in ((0.1, None, 2), (0.03, None, 3), (1.0, 4, 4), (1.0, 1, 1)):
        found = think(*onevision, clip(30, fps), QUESTION, parts=parts, **options)
        assert len(found.thoughts) == expected
        assert found.thoughts[-1].end == pytest.approx(30 / fps)


def test_frames_are_chosen_by_the_question_alone(
    onevision: Any, asked: list[dict[str, Any]]
) -> None:
    scorer = Late()
    found = think(
        *onevision,
        clip(),
        QUESTION,
        "quota",
        retain=0.5,
        frames=4,
        scorer=scorer,
        thought_tokens=2,
        max_new_tokens=2,
        overlap=None,
        base=1.0,
    )
    assert scorer.asked == {QUESTION, *(thought.asked for thought in found.thoughts)}
    assert asked[-1]["source"].plan is not None
    (item,) = found.report.items
    assert item.seconds is not None and len(item.seconds) == 4
    assert 0 < item.after < item.before


def test_frames_that_were_taken_already(onevision: Any, asked: list[dict[str, Any]]) -> None:
    taken = sample_frames(clip(30), 7)
    found = think(*onevision, taken, QUESTION, thought_tokens=1, max_new_tokens=1)
    assert [len(call["source"]) for call in asked] == [3, 4, 7]
    seconds = taken.seconds.tolist()
    assert [(t.start, t.end) for t in found.thoughts] == [
        (seconds[0], seconds[3]),
        (seconds[3], seconds[6]),
    ]
    with pytest.raises(ValueError, match="7 frames cannot be cut into 8"):
        think(*onevision, taken, QUESTION, parts=8)


def test_as_dict_holds_every_part(onevision: Any) -> None:
    found = think(
        *onevision, clip(), QUESTION, "divprune", retain=0.5, thought_tokens=2, max_new_tokens=1
    )
    document = found.as_dict()
    assert document["answer"] == found.text and document["asked"] == found.asked
    assert [part["start"] for part in document["thoughts"]] == [0, 15]
    assert all(part["report"]["items"] for part in document["thoughts"])
    seconds = sum(thought.answer.total for thought in found.thoughts)
    assert document["seconds_of_thinking"] == found.thinking_seconds == seconds > 0


def test_thoughts_cannot_close_the_thought() -> None:
    def thought(text: str, start: float) -> Thought:
        told = answering.Answer(text, foveate.Report("m"), 1, 1, 0.0, 0.0)
        return Thought(start, start + 2.5, "?", told)

    made = [thought("<think>a</think> b", 0), thought("  ", 2.5), thought("c", 5)]
    assert join_thoughts(made) == "From 0 s to 2.5 s: a b From 5 s to 7.5 s: c"
    assert join_thoughts(made, generic=True) == "a b c"


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"question": " "}, ValueError, "empty"),
        ({"parts": 0}, ValueError, "parts"),
        ({"parts": 1.5}, ValueError, "parts"),
        ({"thought_tokens": 0}, ValueError, "thought_tokens"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens"),
        ({"source": clip(1)}, ValueError, "needs a video"),
        ({"source": sample_frames(clip(3), 1)}, ValueError, "needs a video"),
        ({"parts": 31}, FrameRequestError, "cannot be cut into 31"),
        ({"recipe": "nothing"}, foveate.FoveateError, "No method"),
    ],
)
def test_bad_input(
    onevision: Any, options: dict[str, Any], error: type[Exception], reason: str
) -> None:
    given: dict[str, Any] = {"source": clip(), "question": QUESTION, "frames": 2, **options}
    with pytest.raises(error, match=reason):
        think(*onevision, given.pop("source"), given.pop("question"), **given)


def test_parts_can_be_decoded_while_they_are_read(onevision: Any) -> None:
    options: dict[str, Any] = {"frames": 4, "thought_tokens": 3, "max_new_tokens": 2}
    plain = think(*onevision, clip(), QUESTION, overlap=False, **options)
    found = think(*onevision, clip(), QUESTION, overlap=True, chunk=2, **options)
    assert found.text == plain.text and found.asked == plain.asked
    # Frames that were chosen for the question are decoded already when the thoughts are there.
    chosen = think(
        *onevision,
        clip(),
        QUESTION,
        "f2c@frames",
        retain=0.5,
        scorer=Late(),
        overlap=True,
        chunk=2,
        **options,
    )
    assert len(chosen.thoughts) == 2


def test_a_count_of_tokens_is_spent_on_frames(onevision: Any) -> None:
    # 9 tokens a frame (6 x 6 patches, pooled two by two) and a newline.
    found = think(
        *onevision,
        clip(),
        QUESTION,
        "f2c@frames",
        tokens=19,
        frames=4,
        scorer=Late(),
        thought_tokens=1,
        max_new_tokens=1,
    )
    answers = [*(thought.answer for thought in found.thoughts), found]
    assert [len(answer.report.items[0].seconds or ()) for answer in answers] == [2, 2, 2]
