"""Recovery of full length, density peaks as scores, and masks with a gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from foveate import ops


def test_interpolation_keeps_what_is_kept_and_is_linear_between():
    x = torch.tensor([[0.0, 10.0, 4.0], [1.0, 2.0, 3.0]])[..., None]
    place = torch.tensor([[1, 3, 6], [0, 1, 2]])
    full = ops.interpolate_places(x, place, 8)[..., 0]
    assert full[0].tolist() == [0, 0, 5, 10, 8, 6, 4, 4]
    assert full[1].tolist() == [1, 2, 3, 3, 3, 3, 3, 3]
    torch.manual_seed(0)
    values = torch.randn(2, 3, 4, 5).bfloat16()
    found = ops.interpolate_places(values, place, 8)
    assert found.dtype == torch.bfloat16 and found.shape == (2, 8, 4, 5)
    assert torch.equal(found[torch.arange(2)[:, None], place], values)
    with pytest.raises(ValueError, match="nothing to interpolate"):
        ops.interpolate_places(x[:, :0], place[:, :0], 8)


def test_cross_attention_is_torch_multi_head_attention():
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    q, k, v = theirs.in_proj_weight.chunk(3)
    nn.init.normal_(theirs.in_proj_bias)
    bias = theirs.in_proj_bias.chunk(3)
    weights = {
        f"linear_{name}.{kind}": value
        for name, pair in zip("qkv", zip((q, k, v), bias, strict=True), strict=True)
        for kind, value in zip(("weight", "bias"), pair, strict=True)
    }
    weights |= {"proj.weight": theirs.out_proj.weight, "proj.bias": theirs.out_proj.bias}
    query, x = torch.randn(3, 7, 8), torch.randn(3, 4, 8)
    expected = theirs(query, x, x, need_weights=False)[0]
    torch.testing.assert_close(ops.cross_attention(query, x, weights, 2), expected)
    with pytest.raises(ValueError, match=r"lacks linear_k\.weight"):
        ops.cross_attention(query, x, {"linear_q.weight": q}, 2)
    with pytest.raises(ValueError, match="do not divide"):
        ops.cross_attention(query, x, weights, 3)


def test_density_scores_agree_with_the_clustering():
    x = torch.randn(3, 20, 4, generator=torch.Generator().manual_seed(0))
    centres, assignment = ops.dpc_knn(x, 6, k=3)
    assert torch.equal(ops.top_k(ops.density_peak_scores(x, 3), 6), centres)
    assert torch.equal(ops.nearest_centre(x, centres), assignment)
    noise = torch.rand(3, 20, generator=torch.Generator().manual_seed(5))
    drawn = ops.density_peak_scores(x, 3, generator=torch.Generator().manual_seed(5))
    assert torch.equal(drawn, ops.density_peak_scores(x, 3, noise_BN=noise))
    with pytest.raises(ValueError, match="not both"):
        ops.density_peak_scores(x, 3, noise_BN=noise, generator=torch.Generator())


def test_masks_are_exactly_hard_and_have_a_gradient():
    logits = torch.randn(4, 50, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mask = ops.gumbel_keep(logits, generator=torch.Generator().manual_seed(1))
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    (mask * torch.randn(4, 50)).sum().backward()
    assert logits.grad is not None and bool(logits.grad.ne(0).all())
    sure = torch.tensor([[30.0, -30.0], [-30.0, 30.0]])
    assert ops.gumbel_keep(sure).tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match=r"logits must be \[\.\.\., 2\]"):
        ops.gumbel_keep(torch.zeros(3, 4))
