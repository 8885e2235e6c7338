"""B-VLLM against the official code: selector, mixture, temporal and spatial merging."""

from __future__ import annotations

import torch

from foveate import ops
from foveate.core import Reduction
from foveate.methods.b_vllm import condense, join_rows, soft_selector

from .golden_cases import Case, cases, read


def links(case: Case) -> torch.Tensor:
    alike_KK = (ops.cosine_similarity_matrix(case["selector"]) + 1) / 2
    return ops.duplicate_links(alike_KK, case.args["threshold"])


@cases("b_vllm", "logits", "gumbel", "selector")
def test_selector(case: Case) -> None:
    selector_KT = soft_selector(case["logits"], case.args["tau"], case["gumbel"])
    torch.testing.assert_close(selector_KT, case["selector"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(selector_KT.sum(1), torch.ones(len(selector_KT)))


@cases("b_vllm", "selector", "frame_tokens", "selected_tokens")
def test_mixture(case: Case) -> None:
    frames = Reduction.transform(case["selector"])
    got_1KLD = frames.apply(case["frame_tokens"][None])
    torch.testing.assert_close(got_1KLD[0], case["selected_tokens"], atol=1e-6, rtol=1e-5)


@cases("b_vllm", "selector", "dst_idx", "keep_idx", "merged_tokens")
def test_temporal_merge(case: Case) -> None:
    link_K = links(case)
    assert link_K.tolist() == case["dst_idx"].tolist()
    joined = join_rows(link_K, chains="drop")
    assert joined.anchor_BM[0].tolist() == case["keep_idx"].tolist()
    got_1RLD = joined.apply(case["selected_tokens"][None])
    torch.testing.assert_close(got_1RLD[0], case["merged_tokens"], atol=1e-6, rtol=1e-5)


@cases("b_vllm", "selector", "selected_tokens", "merged_tokens")
def test_following_chains_keeps_what_is_dropped(case: Case) -> None:
    """Both rules agree where there is no chain; only one of them loses rows where there is."""
    link_K = links(case)
    has_chain = bool((link_K[link_K.clamp(min=0)] >= 0)[link_K >= 0].any())
    followed, dropped = join_rows(link_K), join_rows(link_K, "drop")
    assert followed.anchor_BM.equal(dropped.anchor_BM)
    assert bool((dropped.groups_BN < 0).any()) == has_chain
    assert bool((followed.groups_BN >= 0).all())
    got_1RLD = followed.apply(case["selected_tokens"][None])
    assert torch.allclose(got_1RLD[0], case["merged_tokens"], atol=1e-5) != has_chain


def test_the_cases_hold_a_chain_and_none() -> None:
    found = [links(case) for case in read("b_vllm")[0]]
    chained = [bool((k[k.clamp(min=0)] >= 0)[k >= 0].any()) for k in found]
    assert not found or sorted(chained) == [False, True]


@cases("b_vllm", "spatial_in", "spatial_out")
def test_spatial_merge(case: Case) -> None:
    x_BLD, num = case["spatial_in"], case.args["spatial_target"]
    got_BnD = condense(x_BLD, num, order="released").apply(x_BLD)
    torch.testing.assert_close(got_BnD, case["spatial_out"], atol=1e-5, rtol=1e-5)
    ordered = condense(x_BLD, num)
    assert (ordered.anchor_BM.diff(dim=1) > 0).all()
    torch.testing.assert_close(
        ordered.apply(x_BLD).sort(1).values, case["spatial_out"].sort(1).values
    )
