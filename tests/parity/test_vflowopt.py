"""VFlowOpt against the official code."""

from __future__ import annotations

import torch

from foveate.core import EncoderAttentionView, Grid, Plane
from foveate.methods.vflowopt import attention_relevance, plane_softmax, recycle

from .golden_cases import Case, cases


def view_of(attention_IHPP: torch.Tensor) -> EncoderAttentionView:
    """A block whose attention is the given one: one channel per patch, logits its logarithm."""
    P = attention_IHPP.shape[-1]
    q_IHPd = torch.eye(P).expand(attention_IHPP.shape) * P**0.5
    return EncoderAttentionView(q_IHPd, attention_IHPP.log().transpose(-1, -2))


@cases("vflowopt", "imp_attn", "imp_entropy", "imp_out")
def test_importance(case: Case) -> None:
    view, entropy_IP = view_of(case["imp_attn"]), case["imp_entropy"]
    I, P = entropy_IP.shape  # noqa: E741
    received_IP = case["imp_attn"].mean(1).mean(1)
    important_IP = received_IP > case.args["t"] * received_IP.mean(1, keepdim=True)
    assert important_IP.any(1).all() and not important_IP.all()
    weight_N = plane_softmax(entropy_IP.flatten(), Grid.video(I, 1, P)) / P
    ours_IP = attention_relevance(view, case.args["t"]) + case.args["alpha"] * weight_N.view(I, P)
    torch.testing.assert_close(ours_IP, case["imp_out"], atol=1e-5, rtol=1e-5)


@cases("vflowopt", "feat", "importance")
def test_prune_and_recycle(case: Case) -> None:
    args, feat_1NC = case.args, case["feat"][None]
    local = Plane(args["local_h"], args["local_w"] - 1, row_newline=True)
    grid = Grid((Plane(27, 27), local))
    assert grid.num_tokens == feat_1NC.shape[1] and args["base"] == 27 * 27
    reduction = recycle(case["importance"], grid, args["keep_ratio"], args["grid"])
    kept_N = torch.zeros(grid.num_tokens, dtype=torch.long)
    kept_N[reduction.anchor_BM[0]] = 1
    assert torch.equal(kept_N, case["kept_mask"])
    torch.testing.assert_close(reduction.apply(feat_1NC)[0], case["out"], atol=1e-5, rtol=1e-5)
    left_M = reduction.gather(case["importance"][None])[0]
    torch.testing.assert_close(left_M, case["out_importance"], atol=0, rtol=0)
