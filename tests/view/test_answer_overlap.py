"""`ask` and `prefill` on clips that are decoded while the model reads."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from checkpoints import FAMILIES, save_checkpoint

import foveate
from foveate.checkpoints import load_model, sample_frames
from foveate.errors import AttachmentError, UnsupportedModelError, VideoSourceError
from foveate.video import Clip
from foveate.view import ask

QUESTION = "what is in the video"
VIDEO_FAMILIES = [family for family in FAMILIES if family != "llava"]


def clip(num: int = 21) -> Clip:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (num, 3, 5, 8), generator=generator).byte()
    return Clip(coarse.repeat_interleave(8, 2).repeat_interleave(8, 3), fps=2)


@pytest.fixture(scope="module")
def onevision(tmp_path_factory: pytest.TempPathFactory):
    folder = save_checkpoint("llava_onevision", tmp_path_factory.mktemp("llava_onevision"))
    return load_model(folder)


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_every_family_gives_the_same_answer(family: str, tmp_path: Path) -> None:
    # 9 frames in chunks of 4: the last one is short, and odd for models that join two frames.
    model, processor = load_model(save_checkpoint(family, tmp_path))
    asked = {"frames": 9, "max_new_tokens": 5}
    plain = ask(model, processor, clip(), QUESTION, overlap=False, **asked)
    told: list[tuple[str, int, int]] = []
    ahead = ask(
        model,
        processor,
        clip(),
        QUESTION,
        overlap=True,
        chunk=4,
        progress=lambda *words: told.append(words),
        **asked,
    )
    assert ahead.text == plain.text and ahead.new_tokens == 5
    assert ahead.prompt_tokens == plain.prompt_tokens
    parts = [(s.stage, s.part) for s in ahead.timeline.spans if s.part >= 0]
    for stage in ("decode", "encode", "prefill"):
        assert [part for name, part in parts if name == stage] == [0, 1, 2]
    assert {stage: (done, total) for stage, done, total in told} == {
        "decode": (9, 9),
        "encode": (9, 9),
        "prefill": (plain.prompt_tokens, plain.prompt_tokens),
        "answer": (5, 5),
    }
    assert 0 < ahead.first_token <= ahead.file_to_first_token
    assert not [t for t in threading.enumerate() if t.name.startswith("foveate-")]


def test_the_report_shows_the_whole_video(onevision, tmp_path: Path) -> None:
    answer = ask(
        *onevision,
        clip(),
        QUESTION,
        "quickvideo",
        retain=0.5,
        frames=12,
        chunk=4,
        overlap=True,
        max_new_tokens=2,
    )
    (item,) = answer.report.items
    assert len(item.grid.planes) == 12 and len(item.seconds) == 12
    assert item.pixels().shape == (12, 3, 40, 64)
    assert torch.equal(item.pixels(), clip().sample(12).pixels)
    text = (answer.report.save(tmp_path / "kept.html")).read_text("utf-8")
    assert "Timeline" in text


def test_frames_may_be_chosen_first(onevision) -> None:
    answer = ask(
        *onevision,
        clip(),
        QUESTION,
        "kffocus@frames + quickvideo",
        retain=0.5,
        frames=8,
        chunk=2,
        overlap=True,
        max_new_tokens=2,
    )
    stages = [stage.stage for stage in answer.report.stages]
    assert stages[0] == "frames" and set(stages[1:]) == {"cache"}
    assert "choose" in answer.timeline.seconds()


@pytest.mark.parametrize(
    ("recipe", "source", "frames", "ahead"),
    [
        (None, clip, 12, True),
        ("quickvideo", clip, 12, True),
        ("pool", clip, 12, True),
        (None, clip, 4, False),
        ("divprune", clip, 12, False),
        ("holitom", clip, 12, False),
        (None, lambda: sample_frames(clip(), 12), 12, False),
    ],
)
def test_it_overlaps_by_itself_where_the_answer_stays(
    onevision, recipe, source, frames, ahead
) -> None:
    answer = ask(*onevision, source(), QUESTION, recipe, frames=frames, chunk=4, max_new_tokens=1)
    parts = {span.part for span in answer.timeline.spans if span.stage == "prefill"}
    assert (parts == {-1, 0, 1, 2}) == ahead and (parts == {-1}) == (not ahead)


def test_one_frame_is_an_image_all_the_same(onevision) -> None:
    one = ask(*onevision, clip(), QUESTION, frames=1, overlap=True, max_new_tokens=2)
    plain = ask(*onevision, clip(), QUESTION, frames=1, overlap=False, max_new_tokens=2)
    assert one.prompt_tokens == plain.prompt_tokens and one.text == plain.text


def test_what_cannot_overlap_says_so(onevision, tmp_path: Path) -> None:
    taken = sample_frames(clip(), 12)
    with pytest.raises(ValueError, match="these frames are decoded already"):
        ask(*onevision, taken, QUESTION, overlap=True)
    with pytest.raises(AttachmentError, match="the end of the prompt"):
        ask(*onevision, clip(), QUESTION, "holitom", overlap=True)
    model, processor = load_model(save_checkpoint("llava", tmp_path))
    with pytest.raises((UnsupportedModelError, foveate.FoveateError)):
        ask(model, processor, clip(), QUESTION, overlap=True)
    with pytest.raises(AttachmentError, match="chooses frames by the question"):
        foveate.prefill(*onevision, clip(), QUESTION, "quota")


def test_a_file_that_breaks_leaves_nothing_behind(onevision, monkeypatch) -> None:
    source = clip()
    taken = source._from_memory

    def breaks(ranks, size):
        if ranks[0] > 10:
            raise VideoSourceError("the disk has gone")
        return taken(ranks, size)

    monkeypatch.setattr(source, "_from_memory", breaks)
    with pytest.raises(VideoSourceError, match="the disk has gone") as caught:
        ask(*onevision, source, QUESTION, "quickvideo", frames=20, chunk=4, overlap=True)
    assert any("at the stage 'decode'" in note for note in caught.value.__notes__)
    assert not [t for t in threading.enumerate() if t.name.startswith("foveate-")]
    ask(*onevision, clip(), QUESTION, "quickvideo", frames=8, chunk=4, max_new_tokens=1)


def test_several_questions_about_one_reading(onevision) -> None:
    model, processor = onevision
    with foveate.prefill(
        model, processor, clip(), QUESTION, "quickvideo", frames=12, chunk=4, retain=0.5
    ) as read:
        first = model.generate(**read.inputs, max_new_tokens=4, do_sample=False)
        other = model.generate(**read.inputs_for("what is red"), max_new_tokens=4, do_sample=False)
    with foveate.prefill(
        model, processor, clip(), "what is red", "quickvideo", frames=12, chunk=4, retain=0.5
    ) as fresh:
        want = model.generate(**fresh.inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(other, want) and not torch.equal(first, other)
