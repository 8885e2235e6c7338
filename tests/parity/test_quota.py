"""QuoTA against the official code."""

from __future__ import annotations

import torch

from foveate.core import Budget, FramePlan, Grid, Plane, ProjectorContext, Tokens
from foveate.methods._frame_sizes import frame_shape
from foveate.methods.quota import QuoTA, capped_weights, frame_weights, token_counts

from .golden_cases import Case, cases


def counts(case: Case) -> tuple[list[int], int]:
    side, version = case.args["side"], case.args["version"]
    budget = case.args["max_token"] * case.args["total"]
    weight_T = frame_weights(case["frame_prob"], case.args["weight_scale"][1])
    if version != "v1":
        weight_T = capped_weights(weight_T, side * side / budget)
    return token_counts(weight_T, budget), budget


@cases("quota", "frame_prob", "frame_tokens")
def test_allocation(case: Case) -> None:
    count_T, _ = counts(case)
    assert count_T == case["frame_tokens"].tolist()
    kept = [frame for frame, n in enumerate(count_T) if n]
    assert kept == case["kept_frame"].tolist()
    side, version = case.args["side"], case.args["version"]
    grids = [frame_shape(count_T[frame], side, side, version) for frame in kept]
    assert grids == [tuple(row) for row in case["grid"].tolist()]


@cases("quota", "features", "tokens")
def test_projector(case: Case) -> None:
    x_TLD, side = case["features"], case.args["side"]
    _, budget = counts(case)
    grid = Grid.video(len(x_TLD), side, side)
    tokens = Tokens.from_grid(x_TLD.flatten(0, 1)[None], grid)
    plan = FramePlan(torch.arange(len(x_TLD)), weight_K=frame_weights(case["frame_prob"]))
    context = ProjectorContext(Budget(tokens=budget), grid=grid, plan=plan)
    reduction = QuoTA(version=case.args["version"]).projector(tokens, context)
    assert reduction is not None
    got_MD = reduction.apply(tokens.x_BND)[0]
    torch.testing.assert_close(got_MD, case["tokens"], atol=1e-5, rtol=1e-5)


@cases("quota", "features", "grid")
def test_a_newline_closes_every_new_row(case: Case) -> None:
    x_TLD, side = case["features"], case.args["side"]
    _, budget = counts(case)
    T, _, D = x_TLD.shape
    newline_TH1D = torch.full((T, side, 1, D), 7.0)
    x_THWD = torch.cat([x_TLD.unflatten(1, (side, side)), newline_TH1D], dim=2)
    grid = Grid((Plane(side, side, row_newline=True),) * T, "video")
    tokens = Tokens.from_grid(x_THWD.flatten(0, 2)[None], grid)
    plan = FramePlan(torch.arange(T), weight_K=frame_weights(case["frame_prob"]))
    context = ProjectorContext(Budget(tokens=budget), grid=grid, plan=plan)
    reduction = QuoTA(version=case.args["version"]).projector(tokens, context)
    assert reduction is not None
    got_MD = reduction.apply(tokens.x_BND)[0]
    is_newline_M = (got_MD == 7).all(1)
    widths = [w for h, w in case["grid"].tolist() for _ in range(h)]
    ends = (torch.tensor(widths) + 1).cumsum(0) - 1
    assert is_newline_M.nonzero()[:, 0].tolist() == ends.tolist()
    torch.testing.assert_close(got_MD[~is_newline_M], case["tokens"], atol=1e-5, rtol=1e-5)
