"""DivPrune against the official code."""

from __future__ import annotations

import torch

from foveate import ops
from foveate.core import Budget, Grid, ProjectorContext, Tokens
from foveate.methods.divprune import DivPrune

from .golden_cases import Case, cases


@cases("divprune", "feat", "kept")
def test_projector(case: Case) -> None:
    feat_NC = case["feat"]
    grid = Grid.image(1, len(feat_NC))
    budget = Budget(retain=case.args["ratio"])
    context = ProjectorContext(budget, grid=grid)
    reduction = DivPrune().projector(Tokens.from_grid(feat_NC, grid), context)
    assert reduction is not None
    assert reduction.anchor_BM[0].tolist() == case["kept"].tolist()
    assert DivPrune().count(grid, budget).tokens == len(case["kept"])
    assert context.state["order"].tolist() == case["order"].tolist()
    kept_KC = reduction.apply(feat_NC[None])[0]
    distance_KK = 1 - ops.cosine_similarity_matrix(kept_KC)
    smallest = distance_KK.fill_diagonal_(torch.inf).min()
    torch.testing.assert_close(smallest, case["min_pairwise"][0], atol=1e-5, rtol=1e-5)
