from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foveate.errors import MissingDependencyError
from foveate.world import World
from foveate.world.export import FORMATS, export, truth_of, write_frames
from foveate.world.overview import contact_sheet

WORLD = World(size=(32, 40), frames=6)


def decoded(path: Path, scale: int) -> np.ndarray:
    """Frames of a video file, shrunk back: float64 [T, H, W, C]."""
    from foveate.video import Clip

    clip = Clip.open(path)
    pixels_TCHW = clip.sample(6).pixels.numpy()
    frames, _, height, width = pixels_TCHW.shape
    blocks = pixels_TCHW.reshape(frames, 3, height // scale, scale, width // scale, scale)
    return blocks.mean((3, 5)).transpose(0, 2, 3, 1)


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_videos_hold_the_frames(tmp_path: Path, scale: int) -> None:
    pytest.importorskip("av")
    frames_THWC = WORLD.sample(3).frames_THWC
    write_frames(frames_THWC, tmp_path / "clip.mp4", fps=4, scale=scale)
    difference = np.abs(decoded(tmp_path / "clip.mp4", scale) - frames_THWC)
    if scale == 1:  # halved colour resolution blurs the edges of shapes
        assert difference.mean() < 5 and np.quantile(difference, 0.8) < 10
    else:
        assert difference.mean() < 2 and difference.max() < 30


def test_videos_of_odd_sides_hold_the_frames(tmp_path: Path) -> None:
    pytest.importorskip("av")
    frames_THWC = World(size=(33, 47), frames=6).sample(1).frames_THWC
    write_frames(frames_THWC, tmp_path / "clip.mp4")
    assert np.abs(decoded(tmp_path / "clip.mp4", 1) - frames_THWC).max() < 30


def test_pictures_hold_the_frames_exactly(tmp_path: Path) -> None:
    frames_THWC = WORLD.sample(3).frames_THWC
    write_frames(frames_THWC, tmp_path / "clip", scale=2)
    files = sorted((tmp_path / "clip").iterdir())
    assert [file.name for file in files] == [f"frame-{number:04d}.png" for number in range(6)]
    for frame_HWC, file in zip(frames_THWC, files, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(file))[::2, 1::2], frame_HWC)


def test_animations_hold_the_frames_nearly(tmp_path: Path) -> None:
    frames_THWC = WORLD.sample(3).frames_THWC
    write_frames(frames_THWC, tmp_path / "clip.gif", fps=5)
    with Image.open(tmp_path / "clip.gif") as picture:
        assert picture.n_frames == 6 and picture.info["duration"] == 200
        for number in range(6):
            picture.seek(number)
            difference = np.abs(
                np.asarray(picture.convert("RGB")) - frames_THWC[number].astype(int)
            )
            assert difference.mean() < 8


@pytest.mark.parametrize("form", FORMATS)
def test_a_folder_is_complete(tmp_path: Path, form: str) -> None:
    if form == "mp4":
        pytest.importorskip("av")
    samples = [WORLD.sample(index) for index in (4, 5)]
    told: list[int] = []
    done = export(samples, tmp_path / "out", form=form, masks=True, progress=told.append)  # type: ignore[arg-type]
    asked = [question for sample in samples for question in sample.questions]
    assert done["clips"] == 2 and done["questions"] == len(asked) and told == [1, 2]
    assert done["tasks"] == Counter(question.task for question in asked)
    suffix = "" if form == "png" else f".{form}"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *(f"clip-00004{suffix}", f"clip-00005{suffix}"),
        *("masks", "overview.png", "questions.jsonl", "truth"),
    ]
    lines = (tmp_path / "out" / "questions.jsonl").read_text().splitlines()
    for line, question in zip(lines, asked, strict=True):
        row = json.loads(line)
        assert (row["question"], row["answer"], row["task"]) == (
            question.text,
            question.answer,
            question.task,
        )
        assert tuple(row["options"]) == question.options
        assert (tmp_path / "out" / row["video"]).exists()
    for sample, number in zip(samples, (4, 5), strict=True):
        mask = Image.open(tmp_path / "out" / "masks" / f"clip-{number:05d}" / "frame-0002.png")
        np.testing.assert_array_equal(np.asarray(mask)[::7, ::7], sample.masks_THW[2])


def test_bench_reads_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("av")
    from foveate.bench.questions import read_questions

    samples = [WORLD.sample(index) for index in range(3)]
    export(samples, tmp_path / "out")
    file, rows, errors = read_questions(tmp_path / "out")
    asked = [question for sample in samples for question in sample.questions]
    assert file.name == "questions.jsonl" and not errors and len(rows) == len(asked)
    for row, question in zip(rows, asked, strict=True):
        assert (row["question"], row["answer"], row["options"], row["task"]) == (
            question.text,
            question.answer,
            question.options,
            question.task,
        )
        assert row["video"].is_file() and row["id"].startswith(row["video"].stem)


def test_truth_in_a_file_is_that_of_the_sample() -> None:
    sample = World(size=32).sample(9)
    told = json.loads(json.dumps(truth_of(sample, scale=3)))
    assert told["size"] == [96, 96] and told["caption"] == sample.caption
    assert told["cuts"] == list(sample.truth.cuts) and len(told["camera"]) == 16
    assert len(told["policies"]) == len(sample.policies)
    for slot, sprite in enumerate(told["sprites"]):
        assert told["classes"][sprite["class"]] in (sprite["shape"], sprite["kind"])
        for frame in range(16):
            box = sample.truth.boxes_TK4[frame, slot]
            assert sprite["boxes"][frame] == (None if box[0] < 0 else (3 * box).tolist())
            assert (sprite["path"][frame] is None) == (not sample.truth.present_TK[frame, slot])
        assert sprite["areas"] == (9 * sample.truth.areas_TK[:, slot]).tolist()


def test_small_clips_are_enlarged_to_even_sides(tmp_path: Path) -> None:
    export([World(size=(33, 64), frames=4).sample(0)], tmp_path / "small", form="png")
    with Image.open(tmp_path / "small" / "clip-00000" / "frame-0000.png") as picture:
        width, height = picture.size
    assert height >= 224 and height % 33 == 0 and height % 2 == width % 2 == 0
    export([World(size=240, frames=4).sample(0)], tmp_path / "large", form="png")
    with Image.open(tmp_path / "large" / "clip-00000" / "frame-0000.png") as picture:
        assert picture.size == (240, 240)


def test_bad_requests_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = WORLD.sample(0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for folder in (tmp_path / "full", tmp_path / "full" / "mine.txt"):
        with pytest.raises(FileExistsError, match="name a new folder"):
            export([sample], folder, form="png")
    with pytest.raises(ValueError, match="unknown format 'avi'; choose one of mp4, png, gif"):
        export([sample], tmp_path / "new", form="avi")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scale must be at least 1, got 0"):
        export([sample], tmp_path / "new", scale=0, form="png")
    with pytest.raises(ValueError, match="two clips have the number of clip-00000"):
        export([sample, sample], tmp_path / "twice", form="png")
    with pytest.raises(ValueError, match="at least one clip"):
        export([], tmp_path / "none", form="png")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingDependencyError, match=r"foveate\[video\]"):
        export([sample], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_examples_of_the_page_run(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "world.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    exec("\n".join(blocks), {})
    out = capsys.readouterr().out
    assert out.startswith("(16, 112, 112, 3) (16, 112, 112)") and re.search(
        "^(un)?safe ", out, re.M
    )


def test_the_sheet_shows_the_frames() -> None:
    sample = World(size=32, frames=4).sample(0)
    sheet = np.asarray(contact_sheet([sample], columns=4, side=32))
    for frame in range(4):
        shown = sheet[12:44, 12 + 36 * frame :][:, :32]
        np.testing.assert_array_equal(shown, sample.frames_THWC[frame])
