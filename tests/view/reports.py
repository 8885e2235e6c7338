"""Small reports with known groups, to draw."""

from __future__ import annotations

import torch

from foveate.core import Evidence, Grid, ItemReport, Reduction, Report, StageReport

DROPPED = -1


def small_report(frames: int = 4, with_pixels: bool = True) -> Report:
    """A video of 4 x 6 patches: the left half merged over time, one patch kept, the rest dropped.

    Per frame: columns 0 to 2 are one token of the whole video; patch (0, 3) is kept alone; columns
    4 and 5 and the rest of column 3 are dropped. One newline token at the end is kept.
    """
    grid = Grid.video(frames, 4, 6, newlines_at_end=1)
    group_THW = torch.full((frames, 4, 6), DROPPED)
    group_THW[:, :, :3] = 0
    group_THW[:, 0, 3] = torch.arange(1, frames + 1)
    groups_N = torch.cat([group_THW.flatten(), torch.tensor([frames + 1])])
    reduction = Reduction.merge(groups_N, frames + 2)
    half = max(1, frames // 2)
    segments = [(0, half - 1), (half, frames - 1)] if frames > 1 else [(0, 0)]
    item = ItemReport(
        0,
        "video",
        grid,
        reduction,
        alive={2: torch.tensor([0, 1]), 3: torch.tensor([0])},
        evidence=[Evidence("segments", "frames", tuple(segments), "runs that are merged")],
        pixels=(lambda: bright_frames(frames)) if with_pixels else None,
        seconds=[0.5 * frame for frame in range(frames)],
    )
    before, after = grid.num_tokens, reduction.num_out
    return Report(
        model="TinyModel",
        recipe="holitom",
        budget="retain=0.15",
        stages=[
            StageReport("projector", "holitom", (before,), (after,)),
            StageReport("decoder", "holitom", (after,), (2,), 2),
        ],
        items=[item],
        layer_lengths=[[after + 9, after + 9, 11, 10]],
        cache_lengths=[[after + 9, after + 9, 11, 8]],
        flops={
            "untouched": {"encoder": 2e9, "prefill": 8e9, "total": 1e10},
            "reduced": {"encoder": 2e9, "prefill": 1e9, "total": 3e9},
        },
        seconds={"projector": 0.012, "decoder": 0.003},
        notes=["a remark"],
    )


def with_evidence() -> Report:
    """The same with evidence of every kind: frame 0 has heat, patch (0, 0) is an anchor."""
    report = small_report()
    (item,) = report.items
    heat_N = torch.full((97,), torch.nan)
    heat_N[:24] = torch.arange(24.0)
    label_N = torch.full((97,), -1, dtype=torch.int32)
    label_N[:2], label_N[3] = 7, 2
    anchor_N, buffer_N = torch.zeros(97, dtype=torch.bool), torch.zeros(97, dtype=torch.bool)
    anchor_N[0], buffer_N[1:3] = True, True
    here = {"method": "thin", "stage": "projector"}
    inside = {"method": "thin", "stage": "decoder"}
    item.evidence += [
        Evidence("saliency", "heat", heat_N, "a caption", **here),
        Evidence("segment of place", "label", label_N, layer=2, **inside),
        Evidence("segment of place", "label", label_N + 0, layer=3, **inside),
        Evidence("anchors", "mark", anchor_N, **here),
        Evidence("buffers", "mark", buffer_N, **here),
        Evidence("scenes", "frames", ((1, 2),), **here),
        Evidence("box", "boxes", ((1, 0, 1, 3, 4),), **here),
    ]
    return report


def bright_frames(frames: int, height: int = 80, width: int = 120) -> torch.Tensor:
    """Light grey frames, so that what is dimmed shows."""
    return torch.full((frames, 3, height, width), 220, dtype=torch.uint8)
