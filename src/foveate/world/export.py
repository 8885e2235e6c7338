"""Clips to files: videos, questions, ground truth, masks.

Legend: T frames; H, W pixels; C colours (3).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from foveate.errors import MissingDependencyError
from foveate.world.overview import contact_sheet
from foveate.world.truth import CLASSES
from foveate.world.vocabulary import COLORS
from foveate.world.world import Sample

Format = Literal["mp4", "png", "gif"]
FORMATS: tuple[Format, ...] = ("mp4", "png", "gif")
#: Shorter side of a written frame, pixels, that small frames are enlarged to at least.
_SHOWN = 224
_SHEET = 12


def export(
    samples: Iterable[Sample],
    folder: str | Path,
    *,
    form: Format = "mp4",
    scale: int | None = None,
    masks: bool = False,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Write clips with everything that is known about them.

    `clip-00000.mp4` (or .gif, or a folder of .png), `questions.jsonl` in the format that
    `foveate bench --suite FOLDER` reads (which takes files, not folders of pictures),
    `truth/clip-00000.json`, `overview.png` (of the first 12 clips), and with `masks`
    `masks/clip-00000/frame-0000.png`, whose palette indices are ids of sprites. Clips are numbered
    as in their world. Everything in pixels refers to the frames as they are written.

    Args:
        samples: the clips.
        folder: where to; made if need be, must be empty.
        form: "mp4" (H.264, needs `foveate[video]`), "png" (exact) or "gif" (256 colours).
        scale: enlarge frames so many times, without smoothing; None: until they are 224 pixels.
        masks: write masks, too.
        progress: called with the number of clips written so far.

    Returns:
        what was written: "folder", "clips", "questions", "tasks" (questions of each).

    Raises:
        ValueError: unknown format, a scale below 1, two clips of one number, or no clips.
        FileExistsError: the folder is not empty.
        MissingDependencyError: mp4 is asked for and PyAV is not installed.
    """
    folder = Path(folder).expanduser()
    _check(folder, form, scale)
    (folder / "truth").mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    shown: list[Sample] = []
    count = 0
    for sample in samples:
        name = f"clip-{int(sample.name.rpartition('/')[2]):05d}"
        if (folder / "truth" / f"{name}.json").exists():
            raise ValueError(f"two clips have the number of {name}; write them to two folders.")
        times = _scale(sample, scale)
        video = name if form == "png" else f"{name}.{form}"
        write_frames(sample.frames_THWC, folder / video, fps=sample.fps, scale=times)
        if masks:
            write_masks(sample.masks_THW, folder / "masks" / name, scale=times)
        truth = json.dumps(truth_of(sample, scale=times)) + "\n"
        (folder / "truth" / f"{name}.json").write_text(truth, encoding="utf-8")
        rows += question_rows(sample, name, video)
        shown += [sample] * (len(shown) < _SHEET)
        count += 1
        if progress:
            progress(count)
    # Last: a folder with questions is a whole one.
    contact_sheet(shown).save(folder / "overview.png")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "questions.jsonl").write_text(lines, encoding="utf-8")
    tasks = [row["task"] for row in rows]
    by_task = {task: tasks.count(task) for task in dict.fromkeys(tasks)}
    return {"folder": str(folder), "clips": count, "questions": len(rows), "tasks": by_task}


def _check(folder: Path, form: str, scale: int | None) -> None:
    if form not in FORMATS:
        raise ValueError(f"unknown format {form!r}; choose one of {', '.join(FORMATS)}.")
    if scale is not None and scale < 1:
        raise ValueError(f"scale must be at least 1, got {scale}.")
    check_folder(folder)
    if form == "mp4":
        _import_av()


def check_folder(folder: Path) -> None:
    """Refuse to write where something is.

    Raises:
        FileExistsError: it is a file, or a folder that is not empty.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; name a new folder.")
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; name a new folder.")


def _scale(sample: Sample, scale: int | None) -> int:
    """How many times to enlarge: small clips to what players show well, odd sides to even ones."""
    if scale is not None:
        return scale
    times = -(-_SHOWN // min(sample.size))
    return times * 2 if any(side * times % 2 for side in sample.size) else times


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise MissingDependencyError(
            'writing mp4 needs PyAV: pip install "foveate[video]"; png and gif need nothing.'
        ) from error
    return av


# -- pictures -------------------------------------------------------------------------------------


def write_frames(
    frames_THWC: np.ndarray, path: str | Path, *, fps: float = 4.0, scale: int = 1
) -> None:
    """Write frames as .mp4 or .gif, or as .png files of a folder, by the path's ending.

    An mp4 plays everywhere and is near lossless: H.264 of high quality whose halved colour
    resolution is that of the frames themselves once they are enlarged twice or more. Sides of an
    odd number of pixels keep their full colour resolution, which some players refuse.

    Args:
        frames_THWC: uint8 [T, H, W, C].
        path: a file that ends in .mp4 or .gif, or the name of a folder.
        fps: frames per second.
        scale: enlarge so many times, without smoothing.

    Raises:
        MissingDependencyError: PyAV is not installed and an mp4 is asked for.
    """
    path = Path(path)
    large_THWC = frames_THWC.repeat(scale, axis=1).repeat(scale, axis=2)
    if path.suffix == ".mp4":
        _write_mp4(large_THWC, path, fps)
        return
    pictures = [Image.fromarray(frame_HWC) for frame_HWC in large_THWC]
    if path.suffix == ".gif":
        # A palette for each frame: one for all would mix up the colours of different shots.
        few = [picture.quantize(256, dither=Image.Dither.NONE) for picture in pictures]
        pause = round(1000 / fps)
        few[0].save(path, save_all=True, append_images=few[1:], duration=pause, loop=0)
        return
    path.mkdir(parents=True)
    for number, picture in enumerate(pictures):
        picture.save(path / f"frame-{number:04d}.png")


def _write_mp4(frames_THWC: np.ndarray, path: Path, fps: float) -> None:
    from fractions import Fraction

    av = _import_av()
    height, width = frames_THWC.shape[1:3]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuv420p" if height % 2 == width % 2 == 0 else "yuv444p"
        matrix = "colorprim=smpte170m:transfer=smpte170m:colormatrix=smpte170m"
        stream.options = {"crf": "6", "preset": "veryfast", "x264-params": matrix}
        for frame_HWC in frames_THWC:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_masks(masks_THW: np.ndarray, folder: str | Path, *, scale: int = 1) -> None:
    """Write masks as .png files with a palette: `numpy.asarray(Image.open(file))` gives the ids.

    Args:
        masks_THW: uint8 [T, H, W].
        folder: a new folder.
        scale: enlarge so many times.
    """
    folder = Path(folder)
    folder.mkdir(parents=True)
    colors = [level for rgb in COLORS.values() for level in rgb]
    palette = [0, 0, 0, *colors * 31]  # the background is black, ids cycle through the colours
    for number, mask_HW in enumerate(masks_THW):
        picture = Image.fromarray(mask_HW.repeat(scale, axis=0).repeat(scale, axis=1))
        picture = picture.convert("P") if picture.mode != "P" else picture
        picture.putpalette(palette)
        picture.save(folder / f"frame-{number:04d}.png")


# -- text -----------------------------------------------------------------------------------------


def question_rows(sample: Sample, name: str, video: str) -> list[dict[str, Any]]:
    """The questions of a clip as lines of `questions.jsonl`.

    Args:
        sample: the clip.
        name: begins the ids of its questions.
        video: the clip's file, relative to that of the questions.
    """
    return [
        {
            "video": video,
            "question": question.text,
            "options": list(question.options),
            "answer": question.answer,
            "task": question.task,
            "id": f"{name}-{number:02d}",
        }
        for number, question in enumerate(sample.questions)
    ]


def truth_of(sample: Sample, *, scale: int = 1) -> dict[str, Any]:
    """Everything that is known about a clip as plain data.

    Boxes are [left, top, right, bottom] in pixels (the last two exclusive), null where a sprite
    shows no pixel; paths are [x, y] in fractions of width and height, null where it is absent.

    Args:
        sample: the clip.
        scale: how many times its frames are enlarged; multiplies pixels and areas.
    """
    scene, truth = sample.scene, sample.truth
    sprites = []
    for slot, one in enumerate(scene.sprites):
        boxes = [
            box if box[0] >= 0 else None for box in (truth.boxes_TK4[:, slot] * scale).tolist()
        ]
        path = [None if x != x else [x, y] for x, y in truth.trajectory(one.id).tolist()]
        facts = {
            key: getattr(one, key)
            for key in ("id", "kind", "role", "shape", "color", "rgb", "texture", "size", "text")
        }
        facts |= {"region": one.region, "direction": one.direction, "depth": one.depth}
        facts |= {"class": CLASSES.index(one.shape or one.kind), "first": one.first}
        facts |= {"last": one.last, "boxes": boxes, "path": path}
        facts["areas"] = (truth.areas_TK[:, slot] * scale**2).tolist()
        sprites.append(facts)
    return {
        "name": sample.name,
        "frames": scene.frames,
        "fps": sample.fps,
        "size": [side * scale for side in sample.size],
        "scale": scale,
        "caption": sample.caption,
        "classes": list(CLASSES),
        "sprites": sprites,
        "cuts": list(scene.cuts),
        "camera": truth.windows_T4.tolist(),
        "static": truth.static_T.tolist(),
        "policies": [
            {
                "name": one.name,
                "text": one.text,
                "verdict": one.verdict,
                "about": list(one.about),
                "frames": one.frames and list(one.frames),
            }
            for one in sample.policies
        ],
    }
