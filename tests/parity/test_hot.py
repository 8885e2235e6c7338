"""HoT against the released code: frames chosen, slot embedding, recovering attention."""

from __future__ import annotations

import torch

from foveate import ops
from foveate.methods.hot import choose_frames

from .golden_cases import Case, cases

HOT = cases("hot", "index", "recovered")


@HOT
def test_frames_are_those_of_the_released_code(case: Case) -> None:
    found_BK = choose_frames(
        case["tokens"],
        case.args["token_num"],
        neighbours=case.args["knn"],
        noise_BF=case["noise"],
    )
    assert torch.equal(found_BK, case["index_sorted"])
    torch.testing.assert_close(case["x"].mean(2), case["tokens"], rtol=0, atol=1e-6)


@HOT
def test_their_ranking_is_the_same(case: Case) -> None:
    score_BF = ops.density_peak_scores(case["tokens"], case.args["knn"], noise_BN=case["noise"])
    ranked_BK = ops.top_k_ranked(score_BF, case.args["token_num"])
    assert torch.equal(ranked_BK, case["index"])


@HOT
def test_every_frame_belongs_to_the_nearest_kept_one(case: Case) -> None:
    mine_BF = ops.nearest_centre(case["tokens"], case["index_sorted"])
    theirs_BF = case["index"].gather(1, case["cluster"])  # as frames: the order does not matter
    assert torch.equal(case["index_sorted"].gather(1, mine_BF), theirs_BF)


@HOT
def test_centre_frame_is_added_to_the_others(case: Case) -> None:
    centre, keep = case.args["center"], case.args["token_num"]
    found_BK = choose_frames(
        case["tokens"], keep, neighbours=case.args["knn"], centre=centre, noise_BF=case["noise"]
    )
    centre_B1 = torch.full_like(found_BK[:, :1], centre)
    theirs_BK = torch.cat([case["index_center"], centre_B1], 1).sort(1).values
    assert torch.equal(found_BK, theirs_BK)


@HOT
def test_selection_with_slots_and_recovery_by_attention(case: Case) -> None:
    index_BK = case["index_sorted"]
    x_BKJC = case["x"][torch.arange(len(index_BK))[:, None], index_BK]
    x_BKJC = x_BKJC + case["pos_embed_token"][:, :, None]
    torch.testing.assert_close(x_BKJC, case["selected"], rtol=0, atol=0)
    weights = {key[3:]: value for key, value in case.tensors.items() if key.startswith("ca.")}
    B, _, J, _ = x_BKJC.shape
    query_NFC = case["x_token"].expand(B * J, -1, -1)
    x_NKC = x_BKJC.transpose(1, 2).flatten(0, 1)
    out_NFC = query_NFC + ops.cross_attention(query_NFC, x_NKC, weights, case.args["heads"])
    out_BFJC = out_NFC.unflatten(0, (B, J)).transpose(1, 2)
    torch.testing.assert_close(out_BFJC, case["recovered"], rtol=1e-5, atol=1e-5)
