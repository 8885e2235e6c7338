"""How sure a model is of its answer, as the relevance of frames; on the embedded model."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from checkpoints import save_checkpoint

import foveate
from foveate.checkpoints import AnsweringScorer, AskingScorer, load_model, own_scorer
from foveate.core.timeline import TIMED_STAGES
from foveate.video import Clip
from foveate.view import ask
from foveate.world.long import LongWorld

#: A clip of three minutes at 2 frames a second with one needle of two seconds.
MINUTES, FPS = 3, 2.0


@pytest.fixture(scope="module")
def embedded():
    return foveate.embedded()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    return load_model(save_checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("qwen2_5_vl")))


def pixels(num: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num, 3, 64, 64), dtype=torch.uint8, generator=draw)


QUESTION = "where is the red star?"


@pytest.mark.parametrize("confidence", ["logit", "probability", "margin", "rise"])
def test_values_belong_to_frames(embedded, confidence) -> None:
    frames = pixels(5)
    options = {"repeat": 2, "shortlist": 1.0, "confidence": confidence}
    together = AnsweringScorer(*embedded, **options, batch=3)
    value = together.relevance(frames, QUESTION)
    assert value.shape == (5,) and value.dtype == torch.float32 and value.isfinite().all()
    alone = AnsweringScorer(*embedded, **options, batch=1)
    torch.testing.assert_close(value, alone.relevance(frames, QUESTION), atol=1e-4, rtol=1e-4)
    turned = together.relevance(frames.flip(0), QUESTION).flip(0)
    torch.testing.assert_close(value, turned, atol=1e-4, rtol=1e-4)
    if confidence in ("probability", "margin"):
        assert (value >= 0).all() and (value <= 1).all()


def test_frames_of_a_window_share_a_value(embedded) -> None:
    scorer = AnsweringScorer(*embedded, window=2, repeat=2, shortlist=1.0)
    value = scorer.relevance(pixels(5), QUESTION)
    assert value[0] == value[1] != value[2] == value[3]
    last = AnsweringScorer(*embedded, window=1, repeat=4).relevance(pixels(5)[4:], QUESTION)
    torch.testing.assert_close(value[4:], last, atol=1e-4, rtol=1e-4)


def test_a_shortlist_gets_a_second_look(embedded) -> None:
    frames = pixels(8)
    every = AnsweringScorer(*embedded, repeat=4, shortlist=1.0).relevance(frames, QUESTION)
    once = AnsweringScorer(*embedded, repeat=1, confidence="probability")
    first = once.relevance(frames, QUESTION)
    value = AnsweringScorer(*embedded, repeat=4, shortlist=0.3).relevance(frames, QUESTION)
    best = first.topk(3).indices
    torch.testing.assert_close(value[best], every[best], atol=1e-4, rtol=1e-4)
    others = torch.ones(8, dtype=torch.bool)
    others[best] = False
    assert value[others].max() < value[best].min()
    assert torch.equal(value[others].argsort(), first[others].argsort())


def test_other_families_can_be_asked(tiny) -> None:
    scorer = AnsweringScorer(*tiny, repeat=2, size=(32, 32))
    value = scorer.relevance(pixels(3)[:, :, :32, :32], "what is in the video")
    assert value.shape == (3,) and value.isfinite().all()


def test_bad_values_are_named(embedded) -> None:
    for name in ("window", "repeat", "batch"):
        for bad in (0, 1.5, True):
            with pytest.raises(ValueError, match=f"{name} must be a whole number"):
                AnsweringScorer(*embedded, **{name: bad})
    for bad in (0.0, 1.5):
        with pytest.raises(ValueError, match="shortlist is a fraction"):
            AnsweringScorer(*embedded, shortlist=bad)
    with pytest.raises(ValueError, match="confidence must be one of"):
        AnsweringScorer(*embedded, confidence="faith")
    with pytest.raises(ValueError, match="question is empty"):
        AnsweringScorer(*embedded).relevance(pixels(1), " ")


def test_a_model_scores_itself_as_it_can(embedded, tiny) -> None:
    assert isinstance(own_scorer(*embedded), AnsweringScorer)
    assert own_scorer(*embedded).size == (64, 64)
    with pytest.raises(foveate.FoveateError):
        AskingScorer(*embedded)
    assert isinstance(own_scorer(*tiny), AnsweringScorer)


@pytest.mark.parametrize("recipe", ["quota", "f2c", "kffocus"])
def test_methods_of_the_frames_stage_take_it(embedded, recipe) -> None:
    clip = LongWorld(40, fps=2.0).sample(0)
    shown = Clip(torch.from_numpy(clip.render(0, 79)).permute(0, 3, 1, 2), fps=2)
    answer = ask(*embedded, shown, clip.events[0].question.text, recipe, frames=8, retain=0.5)
    assert answer.report.stages[0].method == recipe and answer.text


def test_the_needle_is_found(embedded) -> None:
    """Even frames miss a needle of two seconds; the model's own confidence finds it."""
    clip = LongWorld(60 * MINUTES, fps=FPS).sample(2)
    (event,) = clip.events
    frames_T3HW = torch.cat([torch.from_numpy(part) for part in clip.chunks()]).permute(0, 3, 1, 2)
    shown, told = Clip(frames_T3HW, fps=FPS), []

    def times(answer) -> list[float]:
        return [s for s in answer.report.items[0].seconds if event.start <= s < event.stop]

    even = ask(*embedded, shown, event.question.text, "uniform", retain=0.99)
    assert not times(even)
    found = ask(
        *embedded,
        shown,
        event.question.text,
        "f2c@frames",
        frames=16,
        progress=lambda *words: told.append(words),
    )
    assert times(found) and found.text == event.question.answer
    assert list(dict.fromkeys(stage for stage, _, _ in told)) == list(TIMED_STAGES)
    for stage in TIMED_STAGES:
        steps = [(done, total) for name, done, total in told if name == stage]
        assert all(a <= b and t == u for (a, t), (b, u) in pairwise(steps)), stage
        assert steps[-1][0] == steps[-1][1] or stage == "answer"
    assert next(total for stage, _, total in told if stage == "choose") == 60 * MINUTES
