"""FasterVLM against the official code."""

from __future__ import annotations

import torch

from foveate.core import Budget, Grid, Plane, ProjectorContext, Reduction, Tokens
from foveate.methods.fastervlm import FasterVLM, anyres_order

from .golden_cases import Case, cases


def select(case: Case, score_TN: torch.Tensor, tiles: slice) -> tuple[Reduction, torch.Tensor]:
    """The public method on some of the tiles as one image."""
    feat_TNC = case["feat"][tiles]
    side = case.args["side"]
    grid = Grid((Plane(side, side),) * len(feat_TNC))
    x_1NC = feat_TNC.reshape(1, -1, feat_TNC.shape[-1])
    read = {"encoder.cls_attention": score_TN[tiles].reshape(1, -1)}.get
    context = ProjectorContext(Budget(retain=0.5), grid=grid, read=read)
    method = FasterVLM(tokens_per_tile=case.args["tokens_per_tile"])
    reduction = method.projector(Tokens.from_grid(x_1NC, grid), context)
    assert reduction is not None
    assert method.count(grid, context.budget).tokens == reduction.num_out
    return reduction, x_1NC


@cases("fastervlm", "feat", "cls_attn", "out")
def test_projector(case: Case) -> None:
    score_TN = case["cls_attn"].mean(1)
    torch.testing.assert_close(score_TN, case["score"], atol=1e-6, rtol=1e-5)
    tiles, side = case["feat"].shape[0], case.args["side"]
    if not case.args.get("anyres", False):
        for tile in range(tiles):
            reduction, x_1NC = select(case, score_TN, slice(tile, tile + 1))
            expected = case["mask"][tile].nonzero()[:, 0]
            assert reduction.anchor_BM[0].tolist() == expected.tolist()
            assert reduction.apply(x_1NC)[0].equal(case["out"][tile])
        return
    reduction, x_1NC = select(case, score_TN, slice(None))
    flat_K = reduction.anchor_BM[0]
    assert flat_K.tolist() == case["mask"].flatten().nonzero()[:, 0].tolist()
    kept_TK = flat_K.view(tiles, -1) % (side * side)
    order_K = anyres_order(kept_TK, side, case.args["grid_w"])
    assert x_1NC[0, order_K].equal(case["out"])
