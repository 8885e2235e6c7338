"""What `foveate show` does with several pictures: one report of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from foveate.checkpoints import open_clip
from foveate.core import Method, Recipe, Report, StageReport
from foveate.view.encoders import Encoder, load_encoder
from foveate.view.show import Progress, show_video

#: Pictures of one report: more would make a page that no browser likes.
MAX_PICTURES = 64


def show_pictures(
    sources: Sequence[Any],
    recipe: Recipe | Method | str | Iterable[Method] = "tome",
    *,
    encoder: Encoder | str | Path | None = None,
    size: int | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """Reduce several pictures on one encoder, each by itself, and account for all of them.

    Args:
        sources: files of pictures, or clips of one frame; at most 64.
        recipe: as in `foveate.reduce`.
        encoder: as in `show_video`; loaded once.
        size: pixels of the square that pictures are scaled to; None: the encoder's own way.
        device: where to load an encoder that is given by name.
        progress: told what is being done.
        options: `retain`, `tokens` and whatever else `show_video` takes.

    Returns:
        A `Report` with one item per picture, named like its file. Tokens, FLOPs and seconds are
        those of all pictures together.

    Raises:
        ValueError: there are no or too many pictures, or one of them is a video.
        VideoError: a picture cannot be read.
        RecipeError: the recipe cannot act on pictures.

    Example:
        >>> from foveate.view import show_pictures
        >>> report = show_pictures(["cat.jpg", "dog.jpg"], "tome", retain=0.4)   # doctest: +SKIP
        >>> report.save("kept.html")                                             # doctest: +SKIP
    """
    if not 1 <= len(sources) <= MAX_PICTURES:
        raise ValueError(f"show takes 1 to {MAX_PICTURES} pictures at a time, got {len(sources)}.")
    clips = [open_clip(source) for source in sources]
    for clip in clips:
        if len(clip) != 1:
            raise ValueError(
                f"{clip.name} has {len(clip)} frames: show one video at a time, or several "
                "pictures."
            )
    tell = progress or (lambda what, done, total: None)
    if not isinstance(encoder, Encoder):
        tell("load the encoder", 0, 1)
        encoder = load_encoder(encoder, size=size, device=device)
    reports = []
    for number, clip in enumerate(clips):
        tell("encode", number, len(clips))
        reports.append(show_video(clip, recipe, encoder=encoder, **options))
        (item,) = reports[-1].items
        item.sample, item.name = number, clip.name
    return _joined(reports)


def _joined(reports: Sequence[Report]) -> Report:
    """One report of calls that did the same to different pictures."""
    first = reports[0]
    stages = [
        StageReport(
            parts[0].stage,
            parts[0].method,
            tuple(n for part in parts for n in part.before),
            tuple(n for part in parts for n in part.after),
            parts[0].layer,
        )
        for parts in zip(*(report.stages for report in reports), strict=True)
    ]
    return Report(
        first.model,
        first.recipe,
        first.budget,
        stages,
        [item for report in reports for item in report.items],
        flops={name: _sums(reports, lambda r, name=name: r.flops[name]) for name in first.flops},
        block_lengths=[
            sum(block) for block in zip(*(r.block_lengths for r in reports), strict=True)
        ],
        seconds=_sums(reports, lambda report: report.seconds),
        notes=list(dict.fromkeys(note for report in reports for note in report.notes)),
    )


def _sums(
    reports: Sequence[Report], figures: Callable[[Report], Mapping[str, float]]
) -> dict[str, float]:
    """Figures of all reports, part by part."""
    return {part: sum(figures(report)[part] for report in reports) for part in figures(reports[0])}
