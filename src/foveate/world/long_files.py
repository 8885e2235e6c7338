"""Long clips as video files, encoded while they are drawn.

Legend: T frames of a chunk; H, W pixels; C colours (3).
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from foveate.world.export import _import_av, check_folder
from foveate.world.long import LongClip

Fit = Literal["stretch", "letterbox"]
#: Seconds from one key frame to the next at most; cuts make more of them.
KEY_SECONDS = 5.0
#: Encoders -> their options; fast ones, whose pictures a small model still reads.
_CODECS = {
    "libx264": {"crf": "23", "preset": "superfast"},
    "mpeg4": {"qmin": "3", "qmax": "3"},
}
CODECS = tuple(_CODECS)
_MATRIX = "colorprim=smpte170m:transfer=smpte170m:colormatrix=smpte170m"


def write_clip(
    clip: LongClip,
    path: str | Path,
    *,
    size: int | tuple[int, int] = 128,
    drawn: int = 64,
    fit: Fit = "stretch",
    codec: str = "libx264",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write a clip as a video file; memory holds one chunk of frames, whatever its length.

    A frame is drawn as a square and enlarged without smoothing, so that a model that sees small
    squares gets what was drawn. The file appears under its name when it is whole.

    Args:
        clip: what to write.
        path: of the file; its ending names the container, such as .mp4 or .mkv.
        size: of the picture in pixels: one side, or (height, width); even numbers.
        drawn: side of the square that is drawn, pixels, at least 16.
        fit: how a square becomes an oblong: "stretch", or "letterbox" with black beside it.
        codec: one of `CODECS`.
        progress: called with (frames written, frames in all).

    Raises:
        ValueError: a value is out of range.
        MissingDependencyError: PyAV is not installed.

    Example:
        >>> import tempfile
        >>> from foveate.world.long import LongWorld
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_clip(LongWorld(4, fps=4).sample(0), Path(folder) / "clip.mp4")
        ...     os.listdir(folder)
        ['clip.mp4']
    """
    path = Path(path)
    height, width = _checked(size, drawn, fit, codec)
    av = _import_av()
    half = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        with av.open(str(half), "w") as container:
            stream = _stream(container, codec, clip.fps, height, width)
            pictures = _pictures(clip, drawn, height, width, fit)
            for done, frame_HWC in enumerate(pictures, 1):
                frame = av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")
                container.mux(stream.encode(frame))
                if done % 64 == 0 or done == clip.frames:
                    progress(done, clip.frames)
            container.mux(stream.encode(None))
        half.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            half.unlink()


def _checked(size: int | tuple[int, int], drawn: int, fit: str, codec: str) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 16 or height % 2 or width % 2:
        raise ValueError(f"the picture's sides must be even and at least 16 pixels, got {size}.")
    if drawn < 16:
        raise ValueError(f"drawn must be at least 16 pixels, got {drawn}.")
    if fit not in get_args(Fit):
        raise ValueError(f'fit must be "stretch" or "letterbox", got {fit!r}.')
    if codec not in _CODECS:
        raise ValueError(f"codec must be one of {', '.join(_CODECS)}, got {codec!r}.")
    return height, width


def _stream(container: Any, codec: str, fps: float, height: int, width: int) -> Any:
    stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1000))
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    stream.gop_size = max(1, round(KEY_SECONDS * fps))
    stream.options = dict(_CODECS[codec])
    if codec == "libx264":
        stream.options |= {"x264-params": _MATRIX}
    return stream


def _pictures(
    clip: LongClip, drawn: int, height: int, width: int, fit: Fit
) -> Iterator[np.ndarray]:
    """Every frame as it is written: uint8 [H, W, C]."""
    inner = (height, width) if fit == "stretch" else (min(height, width),) * 2
    rows, columns = (_sources(drawn, side) for side in inner)
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    box = np.zeros((height, width, 3), dtype=np.uint8)
    for frames_THWC in clip.chunks(drawn):
        for frame_HWC in frames_THWC:
            box[top : top + inner[0], left : left + inner[1]] = frame_HWC[rows][:, columns]
            yield box


def _sources(drawn: int, side: int) -> np.ndarray:
    """The drawn row or column that each written one repeats: int64 [side]."""
    return np.arange(side) * drawn // side


# -- text -----------------------------------------------------------------------------------------


def question_rows(clip: LongClip, video: str) -> list[dict[str, Any]]:
    """The questions of a clip as lines of `questions.jsonl`, with the seconds of their events."""
    stem = Path(video).stem
    return [
        {
            "video": video,
            "question": event.question.text,
            "options": list(event.question.options),
            "answer": event.question.answer,
            "task": event.question.task,
            "id": f"{stem}-{number:02d}",
            "start": round(event.start, 3),
            "stop": round(event.stop, 3),
        }
        for number, event in enumerate(clip.events)
    ]


def write_questions(rows: list[dict[str, Any]], path: str | Path) -> None:
    """Write lines of `questions.jsonl`."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    Path(path).write_text(text, encoding="utf-8")


def export_long(
    clips: Iterable[LongClip],
    folder: str | Path,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> dict[str, Any]:
    """Write clips and their questions: `clip-00000.mp4` and so on, `questions.jsonl`.

    Args:
        clips: what to write, numbered from 0 in the order given.
        folder: where to; made if need be, must be empty.
        progress: called with (frames written, frames in all) of each clip.
        options: of `write_clip`.

    Returns:
        what was written: "folder", "questions_file", "clips", "seconds", "questions", "tasks"
        (questions of each).

    Raises:
        FileExistsError: the folder is not empty.
        ValueError: an option is out of range, or there are no clips.
    """
    folder, rows, seconds = Path(folder).expanduser(), [], []
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for clip in clips:
        video = f"clip-{len(seconds):05d}.mp4"
        write_clip(clip, folder / video, progress=progress, **options)
        rows += question_rows(clip, video)
        seconds.append(clip.seconds)
    if not seconds:
        raise ValueError("there are no clips to write.")
    # Last: a folder with questions is a whole one.
    write_questions(rows, folder / "questions.jsonl")
    return _done(folder / "questions.jsonl", rows, seconds)


def write_one(clip: LongClip, path: str | Path, **options: Any) -> dict[str, Any]:
    """Write one clip and its questions: `hour.mp4` and, for instance, `hour.jsonl`.

    Args:
        clip: what to write.
        path: the video file; neither it nor its questions may be there.
        options: of `write_clip`.

    Returns:
        as `export_long`.

    Raises:
        FileExistsError: there is such a file.
        ValueError: an option is out of range.
    """
    path = Path(path).expanduser()
    asked = path.with_suffix(".jsonl")
    for file in (path, asked):
        if file.exists():
            raise FileExistsError(f"{file} exists; name a new file.")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_clip(clip, path, **options)
    rows = question_rows(clip, path.name)
    write_questions(rows, asked)
    return _done(asked, rows, [clip.seconds])


def _done(file: Path, rows: list[dict[str, Any]], seconds: list[float]) -> dict[str, Any]:
    tasks = [row["task"] for row in rows]
    return {
        "folder": str(file.parent),
        "questions_file": str(file),
        "clips": len(seconds),
        "seconds": sum(seconds),
        "questions": len(rows),
        "tasks": {task: tasks.count(task) for task in dict.fromkeys(tasks)},
    }
