"""Frames that a recipe chooses for a question: through `ask`, and by a model's own yes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import save_checkpoint

import foveate
from foveate.checkpoints import AskingScorer, load_model, sample_frames
from foveate.errors import UnsupportedModelError
from foveate.video import Clip
from foveate.view import ask

QUESTION = "what is in the video"


class Late:
    """The later, the better: frames are numbered by their brightness."""

    size, probabilities = (4, 4), True

    def relevance(self, pixels_T3hw, question):
        return pixels_T3hw.float().mean((1, 2, 3)) / 255


def clip(num: int = 30) -> Clip:
    level = (8 * torch.arange(num)).to(torch.uint8)[:, None, None, None]
    return Clip(level.expand(-1, 3, 40, 64).clone(), fps=1)


@pytest.fixture(scope="module")
def onevision(tmp_path_factory: pytest.TempPathFactory):
    folder = save_checkpoint("llava_onevision", tmp_path_factory.mktemp("llava_onevision"))
    return load_model(folder)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory):
    return load_model(save_checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("qwen2_5_vl")))


@pytest.mark.parametrize("recipe", ["quota", "f2c", "kffocus"])
@pytest.mark.parametrize("family", ["onevision", "packed"])
def test_ask_chooses_frames(recipe, family, request) -> None:
    model, processor = request.getfixturevalue(family)
    plain = ask(model, processor, clip(), QUESTION, frames=4, max_new_tokens=2)
    answer = ask(
        model,
        processor,
        clip(),
        QUESTION,
        recipe,
        retain=0.5,
        frames=4,
        scorer=Late(),
        max_new_tokens=2,
    )
    first, *others = answer.report.stages
    assert (first.stage, first.method, first.before) == ("frames", recipe, (30,))
    (item,) = answer.report.items
    assert first.after == (len(item.seconds),) and sorted(item.seconds) == item.seconds
    assert [stage.stage for stage in others] == ["projector"]
    assert 0 < answer.report.visual_after < plain.prompt_tokens
    assert "frames" in answer.report.seconds and not answer.report.notes
    assert item.evidence


def test_a_count_of_tokens_is_spent_on_frames(onevision) -> None:
    model, processor = onevision
    per_frame = 36 / 4  # pooled by the model, two by two
    answer = ask(
        model,
        processor,
        clip(),
        QUESTION,
        "f2c@frames",
        tokens=int(2 * per_frame) + 1,
        frames=4,
        scorer=Late(),
        max_new_tokens=2,
    )
    assert 1 <= answer.report.stages[0].after[0] <= 2


def test_frames_taken_before_stay(onevision) -> None:
    model, processor = onevision
    taken = sample_frames(clip(), 4)
    given = ask(model, processor, taken, QUESTION, "kffocus", retain=0.2, max_new_tokens=2)
    assert given.report.items[0].seconds == taken.seconds.tolist()
    assert any("chosen elsewhere" in note for note in given.report.notes)
    chosen = foveate.choose_frames(clip(), "kffocus", QUESTION, 4, retain=0.2)
    known = ask(model, processor, chosen, QUESTION, "kffocus", retain=0.2, max_new_tokens=2)
    assert known.report.stages[0].stage == "frames" and not known.report.notes


# -- asking ---------------------------------------------------------------------------------------


def lettered(folder: Path):
    """A checkpoint whose tokenizer has the two letters in place of two words."""
    save_checkpoint("llava_onevision", folder)
    path = folder / "tokenizer.json"
    text = path.read_text("utf-8")
    path.write_text(text.replace('"red"', '"A"').replace('"white"', '"B"'), "utf-8")
    return load_model(folder)


def test_asking_scorer(tmp_path: Path) -> None:
    model, processor = lettered(tmp_path)
    pixels = clip(5).sample(5).pixels
    together = AskingScorer(model, processor, batch=3).relevance(pixels, QUESTION)
    assert together.shape == (5,) and (together > 0).all() and (together < 1).all()
    alone = AskingScorer(model, processor, batch=1).relevance(pixels, QUESTION)
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-4)
    two = AskingScorer(model, processor, normalise=True).relevance(pixels, QUESTION)
    assert (two > together).all() and (two < 1).all()
    video = AskingScorer(model, processor, kind="video").relevance(pixels, QUESTION)
    assert video.shape == (5,)
    answer = ask(
        model, processor, clip(), QUESTION, "quota", retain=0.5, frames=4, max_new_tokens=2
    )
    assert answer.report.stages[0].method == "quota", "the model itself is asked by default"


def test_asking_for_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = lettered(tmp_path)
    scorer = AskingScorer(model, processor, objects=True)
    assert isinstance(scorer.generate("what is a bike", max_new_tokens=3), str)
    monkeypatch.setattr(scorer, "generate", lambda text: "step 1: yes step 3: ['bike', 'house']")
    assert "any object of bike, house" in scorer._prompt(QUESTION)
    monkeypatch.setattr(scorer, "generate", lambda text: "step 1: no")
    assert QUESTION in scorer._prompt("another " + QUESTION)


def test_models_without_letters(onevision) -> None:
    model, processor = onevision
    with pytest.raises(UnsupportedModelError, match="no token 'A'"):
        AskingScorer(model, processor)
    with pytest.raises(ValueError, match="kind"):
        AskingScorer(model, processor, kind="sound")
    with pytest.raises(ValueError, match="batch"):
        AskingScorer(model, processor, batch=0)
