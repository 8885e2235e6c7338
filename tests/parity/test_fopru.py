"""FoPru against a public re-implementation; there is no official code."""

from __future__ import annotations

import torch

from foveate.core import Budget, EncoderAttentionView, Grid, ProjectorContext, Tokens
from foveate.methods.fopru import FoPru, significance

from .golden_cases import Case, cases


@cases("fopru", "feat", "attn", "significance", "keep", "out")
def test_projector(case: Case) -> None:
    args = case.args
    attn_BHNN, side = case["attn"], args["side"]
    B, H, N, _ = attn_BHNN.shape
    # What the rows lack went to a [CLS] token that was cut off.
    missing = (1 - attn_BHNN.sum(-1, keepdim=True)).clamp_min(0)
    whole_BHNM = torch.cat([missing, attn_BHNN], dim=-1)
    whole_BHMM = torch.cat([torch.full((B, H, 1, N + 1), 1 / (N + 1)), whole_BHNM], dim=2)
    q_BHMM = torch.eye(N + 1).expand(B, H, -1, -1) * (N + 1) ** 0.5
    k_BHMM = whole_BHMM.clamp_min(1e-30).log().mT
    view = EncoderAttentionView(q_BHMM, k_BHMM, num_prefix=1, has_cls=True)
    torch.testing.assert_close(significance(view), case["significance"], atol=1e-6, rtol=1e-5)
    grid = Grid.image(side, side)
    tokens = args["count"] * (side if args["count_unit"] == "rows" else 1)
    method, budget = FoPru(args["strategy"]), Budget(tokens=tokens)
    for image in range(B):
        x_ND, one = case["feat"][image], view.images(image, image + 1)
        context = ProjectorContext(
            budget, grid=grid, encoder_layers=(0,), read_encoder={0: one}.get
        )
        reduction = method.projector(Tokens.from_grid(x_ND, grid), context)
        assert reduction is not None
        assert reduction.anchor_BM[0].tolist() == case["keep"][image].tolist()
        assert reduction.apply(x_ND[None])[0].equal(case["out"][image])
        assert method.count(grid, budget).tokens == case["keep"].shape[1]
