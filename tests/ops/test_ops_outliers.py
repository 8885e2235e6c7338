"""Local outlier factors against the definition, written out."""

from __future__ import annotations

import pytest
import torch

from foveate import ops


def plain(values: list[float], k: int) -> list[float]:
    """M. Breunig et al., definitions 5 to 7, point by point."""
    num = len(values)
    k = min(k, num - 1)
    near, radius = [], []
    for i in range(num):
        others = sorted((abs(values[j] - values[i]), j) for j in range(num) if j != i)[:k]
        near.append([j for _, j in others])
        radius.append(others[-1][0])
    density = []
    for i in range(num):
        reach = [max(abs(values[j] - values[i]), radius[j]) for j in near[i]]
        density.append(1 / (sum(reach) / k + 1e-10))
    return [sum(density[j] for j in near[i]) / k / density[i] for i in range(num)]


@pytest.mark.parametrize("num", [2, 5, 21, 100])
@pytest.mark.parametrize("k", [1, 3, 20])
def test_the_definition(num: int, k: int) -> None:
    generator = torch.Generator().manual_seed(num + k)
    x_BN = torch.rand(3, num, dtype=torch.float64, generator=generator) ** 4
    found_BN = ops.local_outlier_factor(x_BN, k)
    expected = torch.tensor([plain(row, k) for row in x_BN.tolist()], dtype=torch.float64)
    torch.testing.assert_close(found_BN, expected, atol=1e-9, rtol=1e-9)


def test_masked_numbers_are_not_there() -> None:
    generator = torch.Generator().manual_seed(0)
    x_BN = torch.rand(4, 40, generator=generator)
    mask_BN = torch.rand(4, 40, generator=generator) < torch.tensor([[0.9], [0.5], [0.2], [0.05]])
    mask_BN[3] = False
    mask_BN[3, 7] = True
    found_BN = ops.local_outlier_factor(x_BN, 10, mask=mask_BN)
    for row, mask_N, found_N in zip(x_BN[:3], mask_BN, found_BN, strict=False):
        alone_N = ops.local_outlier_factor(row[mask_N][None], 10)[0]
        torch.testing.assert_close(found_N[mask_N], alone_N)
    assert (found_BN[~mask_BN] == 1).all() and found_BN[3, 7] == 1


def test_equal_numbers_and_the_needle() -> None:
    x_1N = torch.zeros(1, 30)
    assert (ops.local_outlier_factor(x_1N, 5) == 1).all()
    x_1N[0, 11] = 1.0
    outlier_N = (ops.local_outlier_factor(x_1N, 5) > 1.5)[0]
    assert outlier_N.nonzero()[:, 0].tolist() == [11]


def test_scale_place_and_order_do_not_matter() -> None:
    x_1N = torch.rand(1, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    order = torch.randperm(50, generator=torch.Generator().manual_seed(3))
    found_1N = ops.local_outlier_factor(x_1N, 7)
    torch.testing.assert_close(ops.local_outlier_factor(x_1N[:, order], 7), found_1N[:, order])
    moved_1N = ops.local_outlier_factor(1e3 * x_1N - 5, 7)
    torch.testing.assert_close(moved_1N, found_1N, atol=1e-6, rtol=1e-6)


def test_one_number_has_no_neighbours() -> None:
    assert ops.local_outlier_factor(torch.tensor([[3.0], [4.0]]), 5).tolist() == [[1.0], [1.0]]


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"x must be \[B, N\]"):
        ops.local_outlier_factor(torch.zeros(3), 2)
    with pytest.raises(ValueError, match="at least 1 neighbour, got 0"):
        ops.local_outlier_factor(torch.zeros(1, 3), 0)
    with pytest.raises(ValueError, match="mask must have shape"):
        ops.local_outlier_factor(torch.zeros(1, 3), 1, mask=torch.ones(1, 4, dtype=torch.bool))
