"""HiPrune against the official code."""

from __future__ import annotations

import torch

from foveate.core import Budget, EncoderAttentionView, Grid, ProjectorContext, Tokens
from foveate.methods.hiprune import HiPrune, hierarchical_choice

from .golden_cases import Case, cases


def view_of(attention_1HRM: torch.Tensor) -> EncoderAttentionView:
    """A block of [CLS] and patches in which R queries attend as stored."""
    R = attention_1HRM.shape[2]
    q_1HRR = torch.eye(R).expand(*attention_1HRM.shape[:2], R, R) * R**0.5
    return EncoderAttentionView(q_1HRR, attention_1HRM.log().mT, num_prefix=1, has_cls=True)


@cases("hiprune", "object_attn", "deep_attn", "mask")
def test_llava(case: Case) -> None:
    args = case.args
    grid = Grid.image(args["grid_h"], args["grid_w"])
    views = {0: view_of(case["object_attn"]), 1: view_of(case["deep_attn"])}
    for name, view in zip(("object_attn", "deep_attn"), views.values(), strict=True):
        stored_1N = case[name].mean((1, 2))[:, 1:]
        torch.testing.assert_close(view.received(queries="all"), stored_1N, atol=1e-7, rtol=1e-5)
    budget = Budget(tokens=args["per_image"])
    context = ProjectorContext(budget, grid=grid, encoder_layers=(0, 1), read_encoder=views.get)
    method = HiPrune(alpha=args["alpha"], neighbours="index")
    reduction = method.projector(Tokens.from_grid(torch.zeros(grid.num_tokens, 2), grid), context)
    assert reduction is not None
    expected = case["mask"][0].nonzero()[:, 0].tolist()
    assert reduction.anchor_BM[0].tolist() == expected
    assert method.count(grid, budget).tokens == len(expected) == args["budget"]


@cases("hiprune", "object_score", "deep_score", "mask", "object_and_buffer", "register")
def test_qwen(case: Case) -> None:
    args = case.args
    grid = Grid.image(args["grid_h"], args["grid_w"])
    method = HiPrune(alpha=args["alpha"], neighbours="index")
    (keep,) = method.kept_per_plane(grid, Budget(retain=args["retain"]))
    kept_1K = hierarchical_choice(
        case["object_score"][None],
        case["deep_score"][None],
        args["grid_w"],
        keep,
        alpha=args["alpha"],
        neighbours="index",
    )
    assert kept_1K[0].tolist() == case["mask"].nonzero()[:, 0].tolist()
    stored = torch.cat([case["object_and_buffer"], case["register"]])
    assert kept_1K[0].tolist() == stored.sort().values.tolist()
