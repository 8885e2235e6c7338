"""GRT against stored numbers of its official code."""

from __future__ import annotations

import torch
from torch.nn.functional import conv2d

from foveate.core import Budget, Grid, PatchesContext, ProjectorContext, Tokens
from foveate.methods.grt import (
    GRT,
    key_frames,
    merge_scenes,
    motion_gate,
    motion_score,
    reused_embeddings,
    scene_divergences,
)

from .golden_cases import Case, cases

CLOSE = {"atol": 1e-5, "rtol": 0}


def method_of(case: Case) -> GRT:
    args = case.args
    return GRT(
        metric=args["metric"],
        tau=args["threshold"],
        scene_cut=args["scene_cut_factor"],
        delta=args["merge_threshold"],
        min_tokens=args["min_tokens_per_frame"],
        released_divergence=True,
    )


@cases("grt", "pixels", "keep", "diff", "score")
def test_gate(case: Case) -> None:
    args = case.args
    keep, change = motion_gate(
        case["pixels"], (args["patch"],) * 2, args["threshold"], args["metric"]
    )
    assert torch.equal(keep, case["keep"].bool())
    torch.testing.assert_close(change[1:], case["diff"], **CLOSE)
    torch.testing.assert_close(motion_score(change), case["score"], **CLOSE)


@cases("grt", "pixels", "keep", "embed", "w/patch")
def test_reused_embeddings(case: Case) -> None:
    fresh = conv2d(case["pixels"], case["w/patch"], case["w/bias"], stride=case.args["patch"])
    embed = reused_embeddings(fresh.flatten(2).mT, case["keep"].bool(), case["w/pos"])
    torch.testing.assert_close(embed, case["embed"], **CLOSE)


@cases("grt", "keep", "features", "key_frames", "divergences", "kept_frames")
def test_scenes(case: Case) -> None:
    key = key_frames(case["keep"].bool(), case.args["scene_cut_factor"])
    assert torch.equal(key, case["key_frames"].bool())
    divergence = scene_divergences(
        case["features"][key].mean(1), lambda x: x @ case["w/lm_head"].T, released=True
    )
    torch.testing.assert_close(divergence, case["divergences"], **CLOSE)
    stays = merge_scenes(key, divergence, case.args["merge_threshold"])
    # Merged key frames are no longer frames of their own; all others are.
    assert (stays | ~key).nonzero()[:, 0].tolist() == case["kept_frames"].tolist()


@cases("grt", "pixels", "features", "w/lm_head", "packed_indices", "packed")
def test_both_stages(case: Case) -> None:
    method, (T, N) = method_of(case), case["features"].shape[:2]
    rows = int(N**0.5)
    grid, budget = Grid.video(T, rows, rows), Budget(retain=case.args["keep_ratio"])
    patches = PatchesContext(
        budget, "grt", pixels_B3HW=case["pixels"], patch_size=(case.args["patch"],) * 2
    )
    assert torch.equal(method.patches(patches), case["keep"].bool())
    context = ProjectorContext(
        budget,
        "grt",
        grid=grid,
        read_carried=lambda name: patches.carried[name].flatten(),
        vocabulary=lambda x: x @ case["w/lm_head"].T,
    )
    x_ND = case["features"].flatten(0, 1)
    reduction = method.projector(Tokens.from_grid(x_ND, grid), context)
    assert reduction is not None
    first_T1 = torch.arange(T)[:, None] * N
    expected = (case["packed_indices"] + first_T1).flatten()
    assert reduction.anchor_BM[0].tolist() == expected.tolist()
    assert reduction.apply(x_ND[None])[0].equal(case["packed"].flatten(0, 1))
    assert method.count(grid, budget).tokens == len(expected)
