"""AIM against the official code."""

from __future__ import annotations

import torch

from foveate import ops
from foveate.core import AttentionView, Budget, DecoderContext, Grid, ProjectorContext, Tokens
from foveate.methods.aim import AIM

from .golden_cases import Case, cases

WALK = {"tau": "temperature", "iters": "iterations", "damping": "damping"}


def walk(case: Case) -> dict:
    return {ours: case.args[theirs] for theirs, ours in WALK.items() if theirs in case.args}


def masked_logits(case: Case, layer: int) -> torch.Tensor:
    """Logits with the causal mask, [1, H, S, S]."""
    logits_HSS = case["raw_logits"][layer]
    future_SS = torch.ones_like(logits_HSS[0], dtype=torch.bool).triu(1)
    return logits_HSS.masked_fill(future_SS, -torch.inf)[None]


@cases("aim", "merge_x")
def test_projector_merges(case: Case) -> None:
    x_FNC = case["merge_x"]
    frames, places, channels = x_FNC.shape
    grid = Grid.video(frames, 1, places)
    tokens = Tokens.from_grid(x_FNC.reshape(1, -1, channels), grid)
    stored = [(f"round {k}", x) for k, x in case.numbered("merge_out_")]
    # One round with a small r is a budget of that many tokens fewer in every frame.
    stored += [(f"r = {r}", x) for r, x in case.numbered("merge_r")]
    assert stored
    for name, expected_FMC in stored:
        budget = Budget(tokens=frames * expected_FMC.shape[1])
        reduction = AIM().projector(tokens, ProjectorContext(budget, grid=grid))
        assert reduction is not None
        out = reduction.apply(tokens.x_BND).view(expected_FMC.shape)
        torch.testing.assert_close(out, expected_FMC, atol=1e-5, rtol=1e-5, msg=name)
        assert AIM().count(grid, budget).tokens == reduction.num_out


@cases("aim", "raw_logits", "importance", "keep_mask")
def test_importance_in_the_masked_form(case: Case) -> None:
    alive_S = torch.ones(case["raw_logits"].shape[-1], dtype=torch.bool)
    for layer, kept_S in enumerate(case["keep_mask"].bool()):
        found = ops.page_rank(
            masked_logits(case, layer), valid=alive_S[None], start="all", **walk(case)
        )
        torch.testing.assert_close(found[0], case["importance"][layer], rtol=1e-4, atol=1e-6)
        alive_S = kept_S


@cases("aim", "raw_logits", "keep_mask")
def test_decoder_prunes(case: Case) -> None:
    kept_after = tuple(case.args["retain_rate"])
    start, end = case.args["visual_start"], case.args["visual_end"]
    num_layers, S = len(kept_after), case["raw_logits"].shape[-1]
    # The last layer drops nothing that a later layer could miss; one more layer shows it.
    method = AIM(schedule=(*kept_after, kept_after[-1]), **walk(case))
    asked = method.decoder_layers(num_layers + 1)
    alive = torch.arange(S)
    for layer in range(1, num_layers + 1):
        if layer in asked:
            alive = drop(method, case, layer, alive, range(start, end))
        mask_S = torch.zeros(S, dtype=torch.long).index_fill(0, alive, 1)
        assert mask_S.tolist() == case["keep_mask"][layer - 1].tolist(), f"after layer {layer - 1}"


def drop(method: AIM, case: Case, layer: int, alive: torch.Tensor, visual: range) -> torch.Tensor:
    """The positions that are left when the method was asked before `layer`."""
    # Queries of one channel per token and unit keys, so that their products are the stored logits.
    logits_HSS = case["raw_logits"][layer - 1][:, alive][:, :, alive]
    keys_HSS = torch.eye(len(alive)).expand_as(logits_HSS)
    is_visual = (alive >= visual.start) & (alive < visual.stop)
    visual_N = is_visual.nonzero()[:, 0]
    view = AttentionView(logits_HSS[None], keys_HSS[None], 1.0, visual_N)
    context = DecoderContext(
        Budget(retain=0.25),
        layer=layer,
        num_layers=len(case.args["retain_rate"]) + 1,
        num_visual=len(visual),
        num_text=case["raw_logits"].shape[-1] - len(visual),
        visual_N=visual_N,
        attention=lambda asked: view,
        survivors=lambda asked: torch.arange(len(alive)),
    )
    reduction = method.decoder(Tokens(torch.zeros(1, len(visual_N), 4)), context)
    if reduction is None:
        return alive
    kept = torch.cat([(~is_visual).nonzero()[:, 0], visual_N[reduction.anchor_BM[0]]])
    return alive[kept.sort().values]
