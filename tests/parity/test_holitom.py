"""HoliTom against the official code."""

from __future__ import annotations

import math
from typing import Any

import torch

from foveate.core import (
    AttentionView,
    Budget,
    DecoderContext,
    Grid,
    Plane,
    ProjectorContext,
    TokenKind,
    Tokens,
)
from foveate.methods.holitom import HoliTom, outer

from .golden_cases import Case, cases


def arguments(case: Case) -> dict[str, Any]:
    names = {"tau": "tau", "beta": "beta", "K": "neighbours", "max_window_size": "max_window"}
    known = {ours: case.args[theirs] for theirs, ours in names.items() if theirs in case.args}
    return {"tau": 0.8} | known


def layout(case: Case) -> tuple[Grid, torch.Tensor]:
    """The grid of the case and its tokens with newline embeddings in place, [N, C]."""
    frames, places, channels = case["feat"].shape
    side = math.isqrt(places)
    height = side if side * side == places else 1
    rows = case.args.get("newline", "one_token") == "grid"
    grid = Grid((Plane(height, places // height, rows),) * frames, "video")
    x_ND = torch.zeros(grid.num_tokens, channels)
    x_ND[grid.patch_index()] = case["feat"].reshape(-1, channels)
    if rows:
        x_ND[grid.kinds() == TokenKind.NEWLINE] = case["newline"]
    return grid, x_ND


@cases("holitom", "feat", "attn", "out")
def test_projector(case: Case) -> None:
    grid, x_ND = layout(case)
    attn_N = torch.full((1, grid.num_tokens), torch.nan)
    attn_N[0, grid.patch_index()] = case["attn"].flatten()
    tokens = Tokens.from_grid(x_ND, grid)
    context = ProjectorContext(
        Budget(retain=case.args.get("retain_ratio", 0.1)),
        grid=grid,
        read={"encoder.received_attention": attn_N}.get,
    )
    newline = case.args.get("newline", "one_token")
    reduction = HoliTom(**arguments(case), newline=newline).projector(tokens, context)
    assert reduction is not None
    out = tokens.reduce(reduction)
    torch.testing.assert_close(out.x_BND[0], case["out"], atol=1e-4, rtol=1e-4)
    assert context.state["segments"] == [tuple(pair) for pair in case["segments"].tolist()]
    assert out.position_BN3 is not None
    frame_M, row_M, column_M = out.position_BN3[0].unbind(-1)
    if "out_frame" in case:
        assert frame_M.tolist() == case["out_frame"].tolist()
    if "out_pos" in case:
        width = grid.planes[0].width
        assert (row_M * width + column_M).tolist() == case["out_pos"].tolist()
    if "out_per_segment" in case:
        first_S = case["segments"][:, 0].contiguous()
        segment_M = torch.searchsorted(first_S, frame_M.contiguous(), right=True) - 1
        counts = torch.bincount(segment_M, minlength=len(first_S))
        assert counts.tolist() == case["out_per_segment"].tolist()


@cases("holitom", "feat", "attn", "segments")
def test_outer(case: Case) -> None:
    merged = outer(
        case["feat"], case["attn"], case.args.get("retain_ratio", 0.1), **arguments(case)
    )
    found = merged.segmentation
    assert found.bounds.tolist() == case["segments"].tolist()
    assert found.removed == int(case["total_reduced"])
    assert found.static.sum(1).tolist() == case["static_count"].tolist()
    assert math.isclose(merged.effective_retain, float(case["effective_ratio"]), rel_tol=1e-4)


@cases("holitom_inner", "hidden", "attn_last_row", "out")
def test_decoder(case: Case) -> None:
    start, length = case.args["start"], case.args["length"]
    hidden_LD, rows_HL = case["hidden"], case["attn_last_row"]
    L = hidden_LD.shape[0]
    # Queries and keys of one channel whose last row of attention is the stored one: the softmax of
    # its logarithm is the row itself, up to a factor that ranking does not see.
    view = AttentionView(
        q_BHSd=torch.ones(1, rows_HL.shape[0], L, 1),
        k_BGTd=rows_HL.clamp_min(1e-30).log()[None, :, :, None],
        scale=1.0,
        visual_N=torch.arange(start, start + length),
    )
    method = HoliTom(inner_layer=3, inner_retain=1 - case.args["r"])
    assert method.decoder_layers(8) == (3,) and method.attention_layers(8) == (2,)
    context = DecoderContext(
        Budget(retain=0.15),
        layer=3,
        num_layers=8,
        visual_N=view.visual_N,
        attention={2: view}.__getitem__,
        survivors=lambda layer: torch.arange(L),
    )
    reduction = method.decoder(Tokens(hidden_LD[None, start : start + length]), context)
    assert reduction is not None
    out_D = reduction.apply(hidden_LD[None, start : start + length])[0]
    whole = torch.cat([hidden_LD[:start], out_D, hidden_LD[start + length :]])
    torch.testing.assert_close(whole, case["out"], atol=1e-4, rtol=1e-4)
    kept = [*range(start), *(reduction.anchor_BM[0] + start).tolist(), *range(start + length, L)]
    assert kept == case["keep"].tolist()
    if "topk_by_rank" in case:
        ranked = set((case["topk_by_rank"]).tolist())
        survivors = set(reduction.anchor_BM[0].tolist())
        assert survivors in (ranked, {i - start for i in ranked})


@cases("holitom_inner", "hidden", "out")
def test_mean_differs_from_sequential(case: Case) -> None:
    # The stored numbers must tell the two variants apart, or the parity test proves nothing.
    from foveate.methods.holitom import inner

    start, length = case.args["start"], case.args["length"]
    hidden_ND = case["hidden"][start : start + length]
    score_N = case["attn_last_row"].mean(0)[start : start + length]
    keep = 1 - case.args["r"]
    one, other = (inner(hidden_ND, score_N, keep, merge=m) for m in ("sequential", "mean"))
    assert one.anchor_BM.equal(other.anchor_BM)
    assert not one.apply(hidden_ND[None]).allclose(other.apply(hidden_ND[None]), atol=1e-3)
