"""The fused weighted sum by group against a plain scatter."""

from __future__ import annotations

import pytest
import torch

from foveate.ops.weighted_sum import weighted_group_sum


def plain(x: torch.Tensor, group: torch.Tensor, weight: torch.Tensor, count: int) -> torch.Tensor:
    out = torch.zeros(x.shape[0], count, x.shape[2], dtype=torch.float64)
    for b, n in (group >= 0).nonzero().tolist():
        out[b, group[b, n]] += weight[b, n].double() * x[b, n].double()
    return out


def draw(seed: int, batch: int = 3, tokens: int = 17, channels: int = 5, groups: int = 6):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, channels, generator=generator)
    group = torch.randint(-1, groups, (batch, tokens), generator=generator)
    return x, group, torch.rand(batch, tokens, generator=generator)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_equals_a_plain_sum(seed: int, dtype: torch.dtype) -> None:
    x, group, weight = draw(seed)
    out = weighted_group_sum(x.to(dtype), group, weight, 6)
    assert out.dtype == dtype
    expected = plain(x.to(dtype), group, weight, 6)
    torch.testing.assert_close(out, expected.to(dtype))


def test_one_token_of_weight_one_is_bit_equal() -> None:
    x, _, _ = draw(0)
    order = torch.randperm(17).expand(3, 17)
    out = weighted_group_sum(x, order, torch.ones(3, 17), 17)
    assert out.equal(torch.empty_like(x).scatter(1, order[..., None].expand_as(x), x))


def test_no_token_and_no_group() -> None:
    x, _, weight = draw(0)
    none = torch.full((3, 17), -1)
    assert not weighted_group_sum(x, none, weight, 4).any()
    assert weighted_group_sum(x, none, weight, 0).shape == (3, 0, 5)
    assert weighted_group_sum(x[:, :0], none[:, :0], weight[:, :0], 2).shape == (3, 2, 5)


def test_tokens_of_no_group_are_not_read() -> None:
    x, group, weight = draw(1)
    x = x.masked_fill((group < 0)[..., None], torch.nan)
    assert bool(weighted_group_sum(x, group, weight, 6).isfinite().all())


def test_gradients() -> None:
    x, group, weight = draw(2)
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, w: weighted_group_sum(a, group, w, 6), (x, weight))


def test_shapes_are_checked() -> None:
    x, group, weight = draw(0)
    with pytest.raises(ValueError, match="assignment must have shape"):
        weighted_group_sum(x, group[:, 1:], weight, 6)
    with pytest.raises(ValueError, match="weight must have shape"):
        weighted_group_sum(x, group, weight[:1], 6)
