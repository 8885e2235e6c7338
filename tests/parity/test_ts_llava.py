"""TS-LLaVA against the official code."""

from __future__ import annotations

import torch

from foveate.core import Budget, Grid, Plane, ProjectorContext, Tokens
from foveate.methods.ts_llava import TSLLaVA, collage_shape, sample_indices, thumbnail

from .golden_cases import Case, cases


@cases("ts_llava", "frames", "thumbnail")
def test_thumbnail(case: Case) -> None:
    frames_TCHW, num = case["frames"], case.args["num_thumb"]
    assert collage_shape(num) == tuple(case["grid_rc"].tolist())
    index = sample_indices(len(frames_TCHW), num)
    assert index.tolist() == case["thumb_frame_idx"].tolist()
    size = case.args["final_height"], case.args["final_width"]
    made = thumbnail(frames_TCHW, num, *size)
    torch.testing.assert_close(made, case["thumbnail"], atol=1e-6, rtol=0)


@cases("ts_llava", "frame_tokens", "visual_tokens")
def test_projector(case: Case) -> None:
    """A video whose last or first frame is the thumbnail: both blocks in the published order."""
    frame_TND, thumb_ND, order = case["frame_tokens"], case["thumb_tokens"], case.args["order"]
    T, N, D = frame_TND.shape
    frames_PD = frame_TND.reshape(T * N, D)
    parts = [frames_PD, thumb_ND] if order == "sampled_first" else [thumb_ND, frames_PD]
    grid = Grid((Plane(1, N),) * (T + 1), "video")
    tokens = Tokens.from_grid(torch.cat(parts)[None], grid)
    method = TSLLaVA(order=order, thumbnail="frame")
    budget = Budget(tokens=case.args["num_sampled"])
    reduction = method.projector(tokens, ProjectorContext(budget, grid=grid))
    assert reduction is not None
    assert torch.equal(reduction.apply(tokens.x_BND), case["visual_tokens"])
    assert method.count(grid, budget).tokens == case["visual_tokens"].shape[1]
    video = Grid((Plane(1, N),) * T, "video")
    context = ProjectorContext(budget, grid=video)
    alone = TSLLaVA().projector(Tokens.from_grid(frames_PD[None], video), context)
    assert alone is not None
    assert alone.anchor_BM[0].tolist() == case["token_idx"].tolist()
    assert torch.equal(alone.apply(frames_PD[None])[0], case["sampled_tokens"])


@cases("ts_llava", "frame_tokens", "visual_tokens")
def test_frames_as_images(case: Case) -> None:
    """An image LLM: every frame and the thumbnail an item of its own."""
    frame_TND, thumb_ND, order = case["frame_tokens"], case["thumb_tokens"], case.args["order"]
    T, N, _ = frame_TND.shape
    items = [*frame_TND, thumb_ND] if order == "sampled_first" else [thumb_ND, *frame_TND]
    grids = (Grid.image(1, N),) * (T + 1)
    method, out = TSLLaVA(images_as_frames=T, order=order), []
    budget = Budget(tokens=case.args["num_sampled"])
    for i, x_ND in enumerate(items):
        tokens = Tokens.from_grid(x_ND[None], grids[i])
        context = ProjectorContext(budget, grid=grids[i], item=i, grids=grids)
        reduction = method.projector(tokens, context)
        out.append(tokens.x_BND if reduction is None else reduction.apply(tokens.x_BND))
    assert torch.equal(torch.cat(out, dim=1), case["visual_tokens"])
