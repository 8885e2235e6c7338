"""Zero-TPrune against its formulas computed in float64 (no official code exists)."""

from __future__ import annotations

import torch

from foveate.methods.zero_tprune import ZeroTPrune, votes

from .golden_cases import Case, cases


def _case(case: Case) -> tuple[ZeroTPrune, dict]:
    args = case.args
    method = ZeroTPrune(
        after=(1,),
        ratios=(args["retention"],),
        rounds=(args["iterations"],),
        similar=0.1,
        low=args["vmin"],
        high=args["vmax"],
    )
    return method, args


@cases("zero_tprune", "attn", "keys", "importance", "kept")
def test_steps(case: Case) -> None:
    method, args = _case(case)
    attention_BHMM, prefix = case["attn"], args["cls_index"] + 1
    B, _, M, _ = attention_BHMM.shape
    low, high = method.low, method.high
    vote_BM, _ = votes(attention_BHMM, 1, low, high)
    torch.testing.assert_close(vote_BM, case["importance_vote"], atol=1e-6, rtol=1e-5)

    everyone_BP = torch.ones(B, M - prefix, dtype=torch.bool)
    gone_BP = method.similar_patches(
        case["keys"].mean(1)[:, prefix:],
        vote_BM[:, prefix:],
        everyone_BP,
        torch.full((B,), args["s_prune"]),
    )
    gone_BR = gone_BP.nonzero()[:, 1].view(B, args["s_prune"]) + prefix
    assert gone_BR.equal(case["pruned_similar"].sort(1).values)

    alive_BM = torch.cat([torch.ones(B, prefix, dtype=torch.bool), ~gone_BP], dim=1)
    alive_BK = alive_BM.nonzero()[:, 1].view(B, -1)
    assert alive_BK.equal(case["alive_after_s"])
    score_BM, heads_BH = votes(attention_BHMM, args["iterations"], low, high, alive_BM)
    torch.testing.assert_close(
        score_BM.gather(1, alive_BK), case["importance"], atol=1e-6, rtol=1e-5
    )
    assert heads_BH.equal(case["heads_used"].bool())


@cases("zero_tprune", "attn", "keys", "kept")
def test_kept(case: Case) -> None:
    method, args = _case(case)
    prefix, kept_BK = args["cls_index"] + 1, case["kept"]
    B, _, M, _ = case["attn"].shape
    P = M - prefix
    count_B2 = torch.tensor([[P - args["s_prune"], kept_BK.shape[1] - prefix]]).expand(B, 2)
    alive_BM, _ = method._prune(
        case["attn"],
        case["keys"].mean(1),
        torch.ones(B, M, dtype=torch.bool),
        count_B2,
        args["iterations"],
        prefix,
    )
    assert alive_BM.nonzero()[:, 1].view(B, -1).equal(kept_BK)
