"""TDC against stored numbers of its official code: scenes, queries, and the layout of tokens."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from foveate import ops
from foveate.core import Grid, Tokens
from foveate.methods.tdc import TDCWeights, Windows, lay_out, static_frames

from .golden_cases import Case, cases


@cases("tdc", "dino", "boundary", "segment_sizes")
def test_scenes(case: Case) -> None:
    x_TNC, max_cuts = case["dino"], case.args["max_num_segments"]
    bounds = ops.scene_segments(x_TNC, max_cuts)
    assert (bounds[:, 1] - bounds[:, 0] + 1).tolist() == case["segment_sizes"].tolist()
    # Of a short video, the official code also names the last frame.
    last = bounds[:, 1].tolist()
    boundary = last if len(x_TNC) <= max_cuts + 1 else last[:-1]
    assert boundary == case["boundary"].tolist()
    found = {cut + 1 for cut in boundary}
    assert len(x_TNC) <= max_cuts + 1 or found == set(case.args["planted_cuts"])
    assert torch.equal(bounds[1:, 0], bounds[:-1, 1] + 1)


def stand_in(query_fKD: torch.Tensor, x_fLD: torch.Tensor) -> torch.Tensor:
    """In place of the trained compressor, when the numbers were stored."""
    return normalize(query_fKD + x_fLD.mean(1, keepdim=True), dim=-1)


@cases("tdc", "dino", "visual", "sep", "tokens")
def test_layout(case: Case) -> None:
    x_TLC, side = case["visual"], round(case.args["static_tokens"] ** 0.5)
    T, L, K = len(x_TLC), x_TLC.shape[1], case.args["context_token_num"]
    bounds = ops.scene_segments(case["dino"], case.args["max_num_segments"])
    static_T = static_frames(bounds, case.args["window"])
    windows = Windows(static_T, static_T.cumsum(0) - 1, torch.where(static_T, L, K))
    assert int(static_T.sum()) == case.args["num_chunks"]
    grid = Grid.video(T, side, side)
    made = lay_out(
        Tokens.from_grid(x_TLC.flatten(0, 1), grid),
        grid,
        windows,
        TDCWeights(stand_in, case["sep"]),
    )
    assert made.features_BMD is not None
    assert made.num_out == case.args["num_tokens"]
    torch.testing.assert_close(made.features_BMD[0], case["tokens"], atol=1e-6, rtol=0)
    # Whole frames are the input, bit for bit.
    whole = (made.matrix()[0].max(1).values == 1) & (made.matrix()[0].sum(1) == 1)
    assert made.features_BMD[0][whole].equal(x_TLC.flatten(0, 1)[made.anchor_BM[0][whole]])
    assert int(whole.sum()) == L * case.args["num_chunks"]


@cases("tdc", "visual", "query0")
def test_queries(case: Case) -> None:
    x_TLC, K = case["visual"], case.args["context_token_num"]
    asked = []

    def note(query_fKD: torch.Tensor, x_fLD: torch.Tensor) -> torch.Tensor:
        asked.append(query_fKD)
        return query_fKD

    side = round(case.args["static_tokens"] ** 0.5)
    grid = Grid.video(3, side, side)
    static_T = torch.tensor([True, False, False])
    windows = Windows(static_T, torch.zeros(3, dtype=torch.long), torch.where(static_T, side**2, K))
    made = lay_out(Tokens.from_grid(x_TLC[:3].flatten(0, 1), grid), grid, windows, TDCWeights(note))
    (query_fKD,) = asked
    assert query_fKD.shape[0] == 2
    for query_KD in query_fKD:
        torch.testing.assert_close(query_KD, case["query0"], atol=1e-6, rtol=0)
    # Without weights a frame is pooled as the queries are.
    same = x_TLC[:1].expand(3, -1, -1).flatten(0, 1)
    pooled = lay_out(Tokens.from_grid(same, grid), grid, windows).apply(same[None])[0]
    torch.testing.assert_close(pooled[-K:], case["query0"], atol=1e-6, rtol=0)
    assert made.num_out == len(pooled) == side**2 + 2 * K
