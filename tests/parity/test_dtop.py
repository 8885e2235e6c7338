"""Dynamic Token Pruning: canvas, scores and final tokens are those of the released head.

Legend: B images, K classes, P patches.
"""

from __future__ import annotations

import torch

from foveate import ops
from foveate.methods.dtop import update_canvas

from .golden_cases import cases


@cases("dtop", "mask_logits0", "finalized0", "canvas0", "pred0")
def test_canvas_scores_and_final_tokens(case):
    stages, last = case.args["stages"], case.args["last_stage_thresh"]
    B, K, P = case["mask_logits0"].shape
    canvas_BKP = torch.full((B, K, P), -torch.inf)
    final_BP = torch.zeros(B, P, dtype=torch.bool)
    place_BP = torch.arange(P).expand(B, P)
    for stage in range(stages):
        logits_BKP, class_BK2 = case[f"mask_logits{stage}"], case[f"cls_logits{stage}"]
        canvas_BKP = update_canvas(canvas_BKP, logits_BKP, place_BP.masked_fill(final_BP, -1))
        assert torch.equal(canvas_BKP, case[f"canvas{stage}"])
        score_BKP = ops.presence_scores(canvas_BKP, class_BK2)
        torch.testing.assert_close(score_BKP, case[f"pred{stage}"], atol=1e-7, rtol=0)
        tau = last if stage == stages - 1 else case.args["thresh"]
        keep = case.args["keep_per_class"]
        final_BP = final_BP | ops.sure_tokens(score_BKP, tau, keep, ~final_BP)
        assert torch.equal(final_BP, case[f"finalized{stage}"].bool())
    assert final_BP.any() and not final_BP.all()
