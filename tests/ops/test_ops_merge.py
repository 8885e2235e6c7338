"""Bipartite matching, merging, group averages and repeated halving."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveate.ops import (
    bipartite_matching,
    gather_tokens,
    halving_weights,
    merge_matched,
    scatter_mean,
    scatter_sum,
    unmerge,
)


def random(*shape, seed=0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference(metric: Tensor, r: int, protected: int) -> tuple[list, list, list]:
    """One sample of the matching, with loops: unmerged, merged and destination positions."""
    unit = metric.double() / metric.double().norm(dim=-1, keepdim=True)
    best = []
    for a in range(0, len(unit), 2):
        scores = [
            (float(unit[a] @ unit[b]), b)
            for b in range(1, len(unit), 2)
            if not (a == 0 and protected) and not (b == 1 and protected == 2)
        ]
        top = max(scores, key=lambda pair: pair[0], default=(-float("inf"), 1))
        best.append((top[0], a, top[1]))
    ranked = sorted(best, key=lambda item: -item[0])
    unmerged = [a for _, a, _ in ranked[r:]]
    return (
        sorted(unmerged) if protected else unmerged,
        [a for _, a, _ in ranked[:r]],
        [b for _, _, b in ranked[:r]],
    )


@given(
    N=st.integers(2, 17),
    r=st.integers(-1, 12),
    protected=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_matching_equals_the_loop(N, r, protected, seed):
    metric = random(2, N, 5, seed=seed)
    matching = bipartite_matching(metric, r, num_protected=protected)
    removed = max(0, min(r, (N - protected) // 2))
    assert matching.merged_BR.shape == matching.destination_BR.shape == (2, removed)
    assert matching.num_source == N and matching.num_kept == N - removed
    for b in range(2):
        unmerged, merged, destination = reference(metric[b], removed, protected)
        if removed == 0:
            unmerged = list(range(0, N, 2))
        assert matching.unmerged_BU[b].tolist() == unmerged
        assert matching.merged_BR[b].tolist() == merged
        assert matching.destination_BR[b].tolist() == destination
        assert matching.all_destinations_BV[b].tolist() == list(range(1, N, 2))


@given(
    N=st.integers(2, 17), r=st.integers(0, 8), protected=st.integers(0, 2), seed=st.integers(0, 99)
)
def test_merging_preserves_mass_and_protected_tokens(N, r, protected, seed):
    x, weights = random(2, N, 3, seed=seed), random(2, N, seed=seed + 1).abs() + 0.1
    matching = bipartite_matching(x, r, num_protected=protected)
    merged, sizes = merge_matched(x, matching, weights=weights)
    total = (x * weights[..., None]).sum(1)
    torch.testing.assert_close(sizes.sum(-1), weights.sum(-1))
    torch.testing.assert_close((merged * sizes[..., None]).sum(1), total, atol=1e-4, rtol=1e-4)
    assert torch.equal(merged[:, :protected], x[:, :protected])
    mean = scatter_mean(x, matching.assignment_BN, matching.num_kept, weights)
    torch.testing.assert_close(merged, mean, atol=1e-5, rtol=1e-4)
    kept = matching.kept_BM
    assert torch.equal(matching.assignment_BN.gather(1, kept)[0], torch.arange(kept.shape[1]))
    assert all(len(set(row)) == len(row) for row in kept.tolist())
    untouched = torch.bincount(matching.assignment_BN[0], minlength=matching.num_kept) == 1
    assert torch.equal(merged[0, untouched], x[0, kept[0, untouched]])


def test_unweighted_merge_counts_tokens():
    x = random(1, 10, 4)
    matching = bipartite_matching(x, 4)
    merged, sizes = merge_matched(x, matching)
    counts = torch.bincount(matching.assignment_BN[0], minlength=6)
    assert sizes[0].tolist() == counts.tolist()
    torch.testing.assert_close(merged, scatter_mean(x, matching.assignment_BN, 6))


def test_order_of_unmerged_sources():
    metric = random(1, 11, 4)
    falling = bipartite_matching(metric, 2)
    ascending = bipartite_matching(metric, 2, sort_unmerged=True)
    assert falling.unmerged_BU[0].tolist() != ascending.unmerged_BU[0].tolist()
    assert sorted(falling.unmerged_BU[0].tolist()) == ascending.unmerged_BU[0].tolist()
    assert torch.equal(falling.merged_BR, ascending.merged_BR)


def test_two_protected_tokens_lead_the_output():
    x = random(2, 9, 4)
    matching = bipartite_matching(x, 2, num_protected=2)
    assert matching.kept_BM[:, :2].tolist() == [[0, 1], [0, 1]]
    assert not bool((matching.destination_BR == 1).any())


def test_equal_tokens_merge_first_and_unmerge_exactly():
    x = random(1, 8, 16)
    x[:, 4] = x[:, 7]
    assert bipartite_matching(x, 1).merged_BR.tolist() == [[4]]
    pairs = random(1, 5, 6).repeat_interleave(2, dim=1)
    matching = bipartite_matching(pairs, 5)
    weights = random(1, 10).abs() + 0.5
    merged, _ = merge_matched(pairs, matching, weights=weights)
    assert torch.equal(unmerge(merged, matching), pairs)
    # All sources alike: nothing but their order decides.
    flat = bipartite_matching(torch.ones(1, 8, 2), 3)
    assert flat.merged_BR.tolist() == [[0, 2, 4]]
    assert flat.destination_BR.tolist() == [[1, 1, 1]]


def test_dtype_gradient_and_half_precision():
    x = random(1, 8, 4).requires_grad_()
    weights = torch.ones(1, 8, requires_grad=True)
    matching = bipartite_matching(x, 3)
    merged, sizes = merge_matched(x, matching, weights=weights)
    (merged.square().sum() + sizes.sum()).backward()
    assert x.grad is not None and weights.grad is not None
    assert bool((x.grad.abs().sum(-1) > 0).all()) and bool(torch.isfinite(weights.grad).all())
    half, sizes = merge_matched(x.detach().bfloat16(), matching)
    assert half.dtype == torch.bfloat16 and sizes.dtype == torch.float32
    torch.testing.assert_close(half.float(), merged.detach(), atol=0.03, rtol=0.03)


def test_gradient_of_merge_is_right():
    x = random(1, 6, 2).double().requires_grad_()
    weights = (random(1, 6).abs() + 0.5).double().requires_grad_()
    matching = bipartite_matching(x, 2)
    assert torch.autograd.gradcheck(
        lambda a, w: merge_matched(a, matching, weights=w)[0], (x, weights)
    )


def test_merge_errors():
    x = random(1, 6, 2)
    matching = bipartite_matching(x, 2)
    with pytest.raises(ValueError, match="5 tokens"):
        merge_matched(x[:, :5], matching)
    with pytest.raises(ValueError, match="weights"):
        merge_matched(x, matching, weights=torch.ones(1, 6, 1))
    with pytest.raises(ValueError, match="keeps 4"):
        unmerge(x, matching)
    with pytest.raises(ValueError, match="0, 1 or 2"):
        bipartite_matching(x, 1, num_protected=3)
    with pytest.raises(ValueError, match="protect 2 of 1"):
        bipartite_matching(x[:, :1], 1, num_protected=2)
    with pytest.raises(ValueError, match="metric"):
        bipartite_matching(x[0], 1)


@given(N=st.integers(1, 10), groups=st.integers(1, 6), seed=st.integers(0, 99))
def test_scatter_mean_equals_the_loop(N, groups, seed):
    generator = torch.Generator().manual_seed(seed)
    x, weights = torch.randn(2, N, 3, generator=generator), torch.rand(2, N, generator=generator)
    assignment = torch.randint(-1, groups, (2, N), generator=generator)
    got = scatter_mean(x, assignment, groups, weights)
    plain = scatter_sum(x, assignment, groups)
    for b in range(2):
        for g in range(groups):
            member = assignment[b] == g
            want = torch.zeros(3)
            if bool(member.any()):
                want = (x[b, member] * weights[b, member, None]).sum(0) / weights[b, member].sum()
            torch.testing.assert_close(got[b, g], want, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(plain[b, g], x[b, member].sum(0), atol=1e-5, rtol=1e-4)
    order = torch.randperm(N, generator=generator)
    moved = scatter_mean(x[:, order], assignment[:, order], groups, weights[:, order])
    torch.testing.assert_close(moved, got, atol=1e-5, rtol=1e-4)


def test_one_hot_sum_is_the_same_sum():
    # The accelerator's form, run here on the CPU.
    from foveate.ops.group import _one_hot_sum

    x = random(2, 9, 3)
    assignment = torch.randint(-1, 4, (2, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(_one_hot_sum(x, assignment, 4), scatter_sum(x, assignment, 4))


def test_bfloat16_means_are_summed_in_float32():
    x = torch.full((1, 1000, 1), 1.0078125, dtype=torch.bfloat16)
    group = torch.zeros(1, 1000, dtype=torch.long)
    assert scatter_mean(x, group, 1).item() == 1.0078125
    assert scatter_sum(x, group, 1).item() == 1007.8125


@given(R=st.integers(0, 12), K=st.integers(1, 5), seed=st.integers(0, 99))
def test_halving_weights_equal_folding_one_by_one(R, K, seed):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, K, (2, R), generator=generator)
    kept, sources = torch.randn(2, K, 3), torch.randn(2, R, 3)
    weights, own = halving_weights(targets, K)
    got = kept * own[..., None] + scatter_sum(sources * weights[..., None], targets, K)
    want = kept.clone()
    for b in range(2):
        for j, target in enumerate(targets[b].tolist()):
            want[b, target] = (want[b, target] + sources[b, j]) / 2
    torch.testing.assert_close(got, want)
    mass = own.clone().scatter_add_(1, targets, weights)
    torch.testing.assert_close(mass, torch.ones(2, K))


def test_gather_tokens():
    x = random(2, 5, 3)
    index = torch.tensor([[4, 0], [1, 1]])
    assert torch.equal(gather_tokens(x, index), torch.stack([x[0, [4, 0]], x[1, [1, 1]]]))
