"""What `ask` tells about time: spans of every stage, and words while it works."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from checkpoints import save_checkpoint

from foveate.checkpoints import load_model
from foveate.core.timeline import Timeline
from foveate.errors import FrameTooLargeError
from foveate.video import Clip
from foveate.view import ask
from foveate.view.decoding import DecodedChunks, join_frames

QUESTION = "what is in the video"


class Late:
    size, probabilities = (4, 4), True

    def relevance(self, pixels_T3hw, question):
        return pixels_T3hw.float().mean((1, 2, 3)) / 255


@pytest.fixture(scope="module")
def onevision(tmp_path_factory: pytest.TempPathFactory):
    folder = save_checkpoint("llava_onevision", tmp_path_factory.mktemp("llava_onevision"))
    return load_model(folder)


def clip(num: int = 40) -> Clip:
    level = (6 * torch.arange(num)).to(torch.uint8)[:, None, None, None]
    return Clip(level.expand(-1, 3, 40, 64).clone(), fps=1)


def test_every_stage_has_its_span(onevision) -> None:
    told: list[tuple[str, int, int]] = []
    answer = ask(
        *onevision,
        clip(),
        QUESTION,
        "quota",
        retain=0.5,
        frames=4,
        scorer=Late(),
        max_new_tokens=3,
        progress=lambda *words: told.append(words),
    )
    line = answer.timeline
    assert list(line.seconds()) == ["choose", "decode", "encode", "prefill", "answer"]
    assert all(early.stop <= late.start for early, late in pairwise(line.spans)), "one by one"
    assert answer.report.timeline is line
    assert Timeline.from_dict(answer.as_dict()["timeline"]).spans == line.spans
    finished = {stage: (done, total) for stage, done, total in told}
    assert list(finished) == ["choose", "decode", "encode", "prefill", "answer"]
    shown = len(answer.report.items[0].seconds)
    assert finished["choose"][0] == finished["choose"][1] >= shown
    assert finished["decode"] == finished["encode"] == (shown, shown)
    assert finished["prefill"] == (answer.prompt_tokens, answer.prompt_tokens)
    assert finished["answer"] == (3, 3)


def test_decoding_tells_chunk_by_chunk() -> None:
    told, line = [], Timeline()
    index = list(range(0, 40, 2))
    chunks = DecodedChunks(clip(), index, line, lambda *words: told.append(words), chunk=8)
    frames = join_frames(chunks, len(index))
    assert told == [("decode", done, 20) for done in (0, 8, 16, 20)]
    assert [(span.stage, span.part) for span in line.spans] == [("decode", n) for n in range(3)]
    want = clip().take(index)
    assert torch.equal(frames.pixels, want.pixels) and torch.equal(frames.seconds, want.seconds)
    assert torch.equal(frames.index, want.index)


def test_frames_that_fill_the_memory_are_refused_before_they_are_decoded(onevision) -> None:
    small = Clip(clip()._pixels_TCHW, max_bytes=10 * 3 * 40 * 64)
    with pytest.raises(FrameTooLargeError):
        ask(*onevision, small, QUESTION, frames=40, max_new_tokens=1)
