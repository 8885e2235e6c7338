"""Spread: a transform in structured form is the transform."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from itertools import pairwise

import pytest
import torch

from foveate.core import Reduction, Tokens, join_rows, spread
from foveate.core.spread import SpreadChain


@pytest.fixture(params=[False, True])
def both(request: pytest.FixtureRequest) -> tuple[Reduction, Reduction]:
    """The structured and the dense form of one map from 9 to 6 tokens."""
    order_B9 = torch.stack([torch.randperm(9) for _ in range(2)])
    anchor_BM, gone_BR = order_B9[:, :6].sort(1).values, order_B9[:, 6:].sort(1).values
    own_BM = torch.rand(2, 6) + 0.1 if request.param else None
    made = spread(9, anchor_BM, gone_BR, torch.rand(2, 6, 3), own_BM)
    return made, Reduction.transform(made.matrix(), anchor_BM)


def test_it_is_the_transform_of_its_matrix(both) -> None:
    made, dense = both
    x_BND, size_BN = torch.randn(2, 9, 4, 2), torch.rand(2, 9)
    torch.testing.assert_close(made.apply(x_BND), dense.apply(x_BND))
    torch.testing.assert_close(made.sizes(size_BN), dense.sizes(size_BN))
    torch.testing.assert_close(made.restore(made.apply(x_BND)), dense.restore(dense.apply(x_BND)))
    assert made.groups_BN.equal(dense.groups_BN)
    assert made.gather(torch.arange(9).expand(2, 9)).equal(made.anchor_BM)
    assert made.counts_B.tolist() == [6, 6] and not made.is_identity
    half = x_BND.bfloat16()
    assert made.apply(half).dtype == torch.bfloat16
    moved = made.to("cpu")
    assert type(moved) is type(made) and moved.matrix().equal(made.matrix())
    torch.testing.assert_close(made.sample(1).matrix()[0], dense.matrix()[1])


def test_it_joins_whatever_comes_before_or_after(both) -> None:
    made, dense = both
    before = Reduction.merge(torch.arange(12)[None].expand(2, 12) % 9, 9)
    later = Reduction.select(torch.tensor([[0, 3, 5], [1, 2, 4]]), 6)
    x_BND = torch.randn(2, 12, 5)
    for first, second, third in (
        (before, made, later),
        (before, dense, later),
    ):
        whole = first.then(second).then(third)
        torch.testing.assert_close(
            whole.apply(x_BND), third.apply(second.apply(first.apply(x_BND))), atol=1e-5, rtol=1e-5
        )
    torch.testing.assert_close(before.then(made).matrix(), before.then(dense).matrix())


def test_sizes_that_are_not_conserved_are_mixed_like_features() -> None:
    weight = torch.tensor([[[0.5], [0.25]]])
    made = spread(3, torch.tensor([[0, 2]]), torch.tensor([[1]]), weight, conserve=False)
    assert made.sizes(torch.ones(1, 3)).tolist() == [[1.5, 1.25]]
    tokens = Tokens(torch.randn(1, 3, 4)).reduce(made)
    assert tokens.size_BN is not None and tokens.size_BN.tolist() == [[1.5, 1.25]]
    kept = spread(3, torch.tensor([[0, 2]]), torch.tensor([[1]]), weight)
    torch.testing.assert_close(kept.sizes(torch.ones(1, 3)), torch.tensor([[5 / 3, 4 / 3]]))


def test_gradients_flow() -> None:
    weight = torch.rand(1, 2, 1, requires_grad=True)
    made = spread(3, torch.tensor([[0, 2]]), torch.tensor([[1]]), weight)
    made.apply(torch.randn(1, 3, 4)).sum().backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0


def test_shapes_have_to_fit() -> None:
    with pytest.raises(ValueError, match="need weights"):
        spread(4, torch.tensor([[0, 2]]), torch.tensor([[1]]), torch.rand(1, 2, 1))
    with pytest.raises(ValueError, match="need weights"):
        spread(3, torch.tensor([[0, 2]]), torch.tensor([[1]]), torch.rand(1, 2, 2))


def chained(lengths: tuple[int, ...] = (12, 9, 7, 5), own: bool = True) -> list[Reduction]:
    """Spreads behind one another."""
    steps = []
    for num_in, num_out in pairwise(lengths):
        order_BN = torch.stack([torch.randperm(num_in) for _ in range(2)])
        anchor_BM, gone_BR = order_BN[:, :num_out].sort(1).values, order_BN[:, num_out:]
        weight_BMR = torch.rand(2, num_out, num_in - num_out)
        own_BM = torch.rand(2, num_out) + 0.1 if own else None
        steps.append(spread(num_in, anchor_BM, gone_BR, weight_BMR, own_BM))
    return steps


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("first", ["spread", "select", "merge", "transform"])
def test_a_chain_is_the_product_of_its_matrices(first: str, own: bool) -> None:
    steps = chained(own=own)
    before = {
        "spread": [],
        "select": [Reduction.select(torch.arange(14, 2, -1).expand(2, 12), 15)],
        "merge": [Reduction.merge(torch.arange(15).expand(2, 15) % 12, 12)],
        "transform": [Reduction.transform(torch.rand(2, 12, 15))],
    }[first]
    whole = reduce(Reduction.then, [*before, *steps])
    matrix = reduce(lambda done, step: step @ done, [s.matrix() for s in [*before, *steps]])
    assert isinstance(whole, SpreadChain) and len(whole.steps) == len(before) + 3
    torch.testing.assert_close(whole.matrix(), matrix)
    assert whole.steps == ()  # the matrix is kept in their place
    dense = Reduction.transform(matrix, whole.anchor_BM)
    x_BND, size_BN = torch.randn(2, whole.num_in, 3), torch.rand(2, whole.num_in)
    torch.testing.assert_close(whole.apply(x_BND), dense.apply(x_BND))
    torch.testing.assert_close(whole.sizes(size_BN), dense.sizes(size_BN))
    torch.testing.assert_close(whole.restore(x_BND[:, :5]), dense.restore(x_BND[:, :5]))
    assert whole.groups_BN.equal(dense.groups_BN)


def test_a_chain_goes_on_behind_its_matrix() -> None:
    one, two, three = chained()
    start = one.then(two)
    early = start.matrix()
    whole, lazy = start.then(three), one.then(two).then(three)
    assert isinstance(whole, SpreadChain) and whole.steps[0] is start
    torch.testing.assert_close(whole.matrix(), three.matrix() @ early)
    torch.testing.assert_close(whole.matrix(), lazy.matrix())
    later = Reduction.select(torch.tensor([[4, 0], [1, 2]]), 5)
    picked = lazy.then(later).matrix()
    torch.testing.assert_close(
        picked, torch.stack([m[i] for m, i in zip(lazy.matrix(), later.anchor_BM, strict=True)])
    )
    moved, single = one.then(two).to("cpu"), one.then(two).sample(1)
    torch.testing.assert_close(moved.matrix(), early)
    torch.testing.assert_close(single.matrix()[0], early[1])
    part = replace(start, anchor_BM=start.anchor_BM[:1], matrix_BMN=start.matrix()[:1])
    assert part.matrix().equal(early[:1])


def test_a_chain_beside_another_image() -> None:
    """Frames joined into one row have their matrices on the diagonal."""
    one, two, _ = chained()
    for made in (one, one.then(two)):
        joined = join_rows(made, 2)
        torch.testing.assert_close(joined.matrix()[0], torch.block_diag(*made.matrix()))


def test_looking_at_a_part_of_a_chain_changes_nothing() -> None:
    one, two, three = chained((40, 31, 20, 11))
    whole = one.then(two).then(three).matrix()
    start = one.then(two)
    assert start.groups_BN.shape == (2, 40)
    assert start.then(three).matrix().equal(whole)
