"""Free Video-LLM against the official code."""

from __future__ import annotations

import torch

from foveate.core import Budget, Grid, ProjectorContext, Tokens
from foveate.methods.free_video_llm import (
    FreeVideoLLM,
    Paths,
    middle_frames,
    partners,
    pooled_shape,
    region_boxes,
    top_change_frames,
)

from .golden_cases import Case, cases

PUBLISHED = Budget(retain=0.5, published=True)
NEEDED = ("features", "clip_text", "clip_image", "clip_patch_hidden", "visual_tokens")


def signals_of(case: Case) -> dict[str, torch.Tensor]:
    text_1E, image_TE = case["clip_text"], case["clip_image"]
    patches = (case["clip_patch_hidden"] @ case["clip_visual_projection"])[:, 1:]
    return {
        "text.frame_similarity": torch.cosine_similarity(text_1E, image_TE)[None],
        "paired.text": text_1E,
        "paired.patches": patches.flatten(0, 1)[None],
    }


def projected(case: Case, **arguments):
    T, N, _ = case["features"].shape
    side = case.args["side"]
    grid = Grid.video(T, side, side)
    assert grid.num_patches == T * N
    tokens = Tokens.from_grid(case["features"].flatten(0, 1), grid)
    context = ProjectorContext(PUBLISHED, grid=grid, read=signals_of(case).get)
    method = FreeVideoLLM(spec=case.args["spec"], **arguments)
    reduction = method.projector(tokens, context)
    assert reduction is not None
    assert reduction.num_out == method.count(grid, PUBLISHED).tokens
    return tokens, reduction


@cases("free_video_llm", *NEEDED)
def test_frames(case: Case) -> None:
    paths, T = Paths.parse(case.args["spec"]), len(case["features"])
    score_T = signals_of(case)["text.frame_similarity"][0]
    for name, num in (("slow_idx", paths.slow), ("fast_idx", paths.fast)):
        assert score_T.topk(num).indices.sort().values.tolist() == case[name].tolist()
    assert middle_frames(T, paths.middle) == case["middle_idx"].tolist()
    change = case["change_idx"]
    assert top_change_frames(case["features"], len(change)).tolist() == change.tolist()


@cases("free_video_llm", *NEEDED)
def test_boxes(case: Case) -> None:
    side, paths = case.args["side"], Paths.parse(case.args["spec"])
    pooled = pooled_shape(side, side, "code")
    pair_P2 = partners(side, side, "code")
    frame_F = torch.cat([case["slow_idx"], case["middle_idx"]])
    shown_TLE = signals_of(case)["paired.patches"].view(len(case["features"]), side * side, -1)
    shown_FPE = shown_TLE[frame_F][:, pair_P2].amax(2)
    similarity_FP = torch.cosine_similarity(case["clip_text"], shown_FPE, dim=2)
    box = paths.box(pooled)
    left_top_F2 = region_boxes(similarity_FP, pooled, box, paths.roi)
    right_bottom_F2 = left_top_F2 + torch.tensor(box[::-1])
    assert torch.cat([left_top_F2, right_bottom_F2], 1).tolist() == case["boxes_ltrb"].tolist()


@cases("free_video_llm", *NEEDED)
def test_projector(case: Case) -> None:
    """All steps, from features to visual tokens."""
    tokens, reduction = projected(case, layout="code")
    made = tokens.reduce(reduction).x_BND
    torch.testing.assert_close(made, case["visual_tokens"], atol=1e-6, rtol=1e-5)


@cases("free_video_llm", *NEEDED)
def test_the_true_layout_keeps_the_counts(case: Case) -> None:
    tokens, reduction = projected(case)
    assert tokens.reduce(reduction).x_BND.shape == case["visual_tokens"].shape
    assert not torch.equal(tokens.reduce(reduction).x_BND, case["visual_tokens"])
