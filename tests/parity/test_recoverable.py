"""Recoverable Compression against the official code."""

from __future__ import annotations

import torch

from foveate.core import Budget, EncoderAttentionView, Grid, ProjectorContext, Tokens
from foveate.methods.recoverable import TEXT_SCALE, Recoverable, outlier_counts

from .golden_cases import Case, cases

PUBLISHED = Budget(retain=0.1, published=True)
NEEDED = ("q", "k", "feat", "text_sim", "cls_attn", "by_vision", "by_text", "kept", "out")


def view_of(case: Case, heads: int = 1) -> EncoderAttentionView:
    """The last block, full-width projections cut into heads; [CLS] first."""
    q, k = (case[name].unflatten(1, (heads, -1)).transpose(0, 1)[None] for name in "qk")
    return EncoderAttentionView(q, k, num_prefix=1, has_cls=True)


@cases("recoverable", *NEEDED)
def test_visual_scores(case: Case) -> None:
    for heads in (1, 2, 4):
        score_1N = view_of(case, heads).joined().cls()
        torch.testing.assert_close(score_1N[0], case["cls_attn"], atol=1e-7, rtol=1e-5)


@cases("recoverable", *NEEDED)
def test_counts(case: Case) -> None:
    args, width = case.args, case["k"].shape[1]
    counts_13 = outlier_counts(
        case["cls_attn"][None],
        case["text_sim"][None],
        neighbours=args["lof_k_select"],
        centre_neighbours=args["lof_k_centres"],
        released_width=width,
    )
    stored = [len(case["by_vision"]), len(case["by_text"]), args["n_merged"]]
    assert counts_13[0].tolist() == stored


@cases("recoverable", *NEEDED)
def test_projector(case: Case) -> None:
    """All steps, from projections to tokens."""
    grid, args = Grid.image(1, len(case["feat"])), case.args
    view = view_of(case, heads=2)
    signals = {"text.patch_similarity": case["text_sim"][None] / TEXT_SCALE}
    context = ProjectorContext(
        PUBLISHED, grid=grid, read=signals.get, encoder_layers=(0,), read_encoder={0: view}.get
    )
    method = Recoverable(
        neighbours=args["lof_k_select"],
        centre_neighbours=args["lof_k_centres"],
        merged=args["knn"],
        released=True,
    )
    tokens = Tokens.from_grid(case["feat"], grid)
    reduction = method.projector(tokens, context)
    assert reduction is not None
    kept = case["kept"].tolist()
    assert sorted([*case["by_vision"].tolist(), *case["by_text"].tolist()]) == kept
    assert len(kept) == args["n_kept"]
    assert reduction.anchor_BM[0, : len(kept)].tolist() == kept
    out_MD = reduction.apply(tokens.x_BND)[0]
    assert torch.equal(out_MD[: len(kept)], case["out"][: len(kept)])
    torch.testing.assert_close(out_MD, case["out"], atol=1e-6, rtol=1e-5)
