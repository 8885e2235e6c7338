"""Frames that were chosen before a call: which item each choice is about, and the report of it.

Legend: K frames that are shown of a clip.
"""

from __future__ import annotations

from collections.abc import Sequence

from foveate.attach.sequence import VisualItem
from foveate.core import FramePlan, Recipe, Report, StageReport
from foveate.errors import AttachmentError

Plans = Sequence[FramePlan | None]


def deal_plans(
    items: list[list[VisualItem]], plans: Plans, repeats: int
) -> list[list[FramePlan | None]]:
    """The plan of every item, fitted to its planes; None for items without one.

    Args:
        items: per row of the batch, in the order of the prompt.
        plans: one entry per image or video of the batch, sample by sample; none: nobody chose.
        repeats: rows of every sample, as beam search expands them.

    Raises:
        AttachmentError: there are more or fewer plans than items, or one does not fit its video.
    """
    if not plans:
        return [[None] * len(sample) for sample in items]
    shown = sum(len(sample) for sample in items[::repeats])
    if len(plans) != shown:
        raise AttachmentError(
            f"There are {len(plans)} plans of frames, and {shown} images and videos in the prompt: "
            "give one entry for each, in the order of the prompt, None for those without a plan."
        )
    dealt, start = [], 0
    for row, sample in enumerate(items):
        if row % repeats == 0 and row:
            start += len(items[row - 1])
        mine = plans[start : start + len(sample)]
        dealt.append([_fitted(plan, item) for plan, item in zip(mine, sample, strict=True)])
    return dealt


def _fitted(plan: FramePlan | None, item: VisualItem) -> FramePlan | None:
    if plan is None or item.modality == "image":
        return None
    try:
        return plan.for_planes(len(item.grid.planes))
    except ValueError as error:
        raise AttachmentError(f"A plan of frames does not fit its video: {error}") from error


def note_plans(report: Report, recipe: Recipe, plans: Plans) -> None:
    """Add the frames stage to a report, and say where nobody let its methods choose."""
    made = [plan for plan in plans if plan is not None]
    chosen = [plan for plan in made if plan.num_candidates]
    if chosen:
        names = " + ".join(dict.fromkeys(plan.method for plan in chosen))
        before = tuple(plan.num_candidates for plan in chosen)
        after = tuple(plan.num_frames for plan in chosen)
        report.stages.insert(0, StageReport("frames", names, before, after))
        report.spend("frames", sum(plan.spent for plan in chosen))
    names = [recipe.steps[index].method.name for index in recipe.at("frames")]
    if names and not made:
        report.notes.append(
            f"{', '.join(names)}: the frames were chosen elsewhere or not at all. "
            "foveate.choose_frames and foveate.ask choose them before they are decoded."
        )
