"""ToDRE against a transcription of the paper's pseudocode; there is no official code."""

from __future__ import annotations

import pytest
import torch

from foveate.core import AttentionView, Budget, DecoderContext, Grid, ProjectorContext, Tokens
from foveate.methods.todre import Objective, ToDRE, attention_share

from .golden_cases import Case, cases

OBJECTIVES: dict[str, Objective] = {"order_maxsum": "max_sum", "order_kcenter": "k_center"}


@cases("todre", "feat", "cls_attn")
@pytest.mark.parametrize("stored", OBJECTIVES)
def test_diversity(case: Case, stored: str) -> None:
    feat_NC, k = case["feat"], case.args["k"]
    grid = Grid.image(1, len(feat_NC))
    signals = {"encoder.cls_attention": case["cls_attn"][None]}
    context = ProjectorContext(Budget(tokens=k), grid=grid, read=signals.get)
    reduction = ToDRE(OBJECTIVES[stored]).projector(Tokens.from_grid(feat_NC, grid), context)
    assert reduction is not None
    order = context.state["order"].tolist()
    assert order[0] == case.args["pivot"]
    assert order == case[stored].tolist()
    assert reduction.anchor_BM[0].tolist() == sorted(order)


@cases("todre", "llm_attn_high", "llm_attn_low")
@pytest.mark.parametrize("which", [0, 1])
def test_relevance(case: Case, which: int) -> None:
    attention_HSS = case[("llm_attn_high", "llm_attn_low")[which]]
    system, num = case.args["n_system"], case.args["n_visual"]
    S = attention_HSS.shape[-1]
    visual_N, text_R = torch.arange(system, system + num), torch.arange(system + num, S)
    # Queries whose logits with one-hot keys are the logarithms of the stored weights.
    keys_HSS = torch.eye(S).expand_as(attention_HSS)
    logits_HSS = attention_HSS.clamp_min(1e-30).log()
    view = AttentionView(logits_HSS[None], keys_HSS[None], 1.0, visual_N)
    torch.testing.assert_close(view.rows(torch.arange(S))[0], attention_HSS, atol=1e-6, rtol=1e-5)
    context = DecoderContext(
        Budget(retain=0.5),
        layer=29,
        num_layers=32,
        num_visual=num,
        num_text=S - num,
        visual_N=visual_N,
        attention={28: view}.__getitem__,
        survivors=lambda layer: torch.arange(S),
    )
    method = ToDRE(tau=case.args["tau"])
    reduction = method.decoder(Tokens(torch.zeros(1, num, 4)), context)
    share = context.state["text_to_visual"]
    torch.testing.assert_close(share, case["alpha_t2v"][which], atol=1e-6, rtol=1e-5)
    assert (reduction is not None) == bool(case["drop"][which])
    # The other direction, which the method takes for granted, is 0.
    back = attention_share(attention_HSS.mean(0)[visual_N].sum(0), text_R)
    assert float(back) == float(case["alpha_v2t"][which]) == 0.0
