"""Tokens: whatever belongs to a token goes where the token goes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core import Grid, Plane, Reduction, TokenKind, Tokens


def labelled(batch: int, num: int) -> Tokens:
    """Tokens in which every tensor repeats the token's number."""
    number_BN = torch.arange(batch * num).view(batch, num)
    return Tokens(
        number_BN[..., None].float(),
        mask_BN=number_BN % 5 != 4,
        position_BN3=number_BN[..., None].expand(-1, -1, 3),
        size_BN=number_BN.float() + 1,
        kind_BN=number_BN % 3,
        protected_BN=number_BN % 2 == 0,
        extra={"score": number_BN * 10.0, "pair": torch.stack([number_BN, -number_BN], -1)},
    )


def test_all_state_is_permuted_together() -> None:
    tokens = labelled(2, 7)
    kept = tokens.reduce(Reduction.select(torch.tensor([[6, 0, 2], [1, 5, 4]]), 7))
    number_BN = torch.tensor([[6, 0, 2], [8, 12, 11]])
    assert torch.equal(kept.x_BND[..., 0], number_BN.float())
    assert torch.equal(kept.position_BN3, number_BN[..., None].expand(-1, -1, 3))
    assert torch.equal(kept.mask_BN, number_BN % 5 != 4)
    assert torch.equal(kept.size_BN, number_BN.float() + 1)
    assert torch.equal(kept.kind_BN, number_BN % 3)
    assert torch.equal(kept.protected_BN, number_BN % 2 == 0)
    assert torch.equal(kept.extra["score"], number_BN * 10.0)
    assert torch.equal(kept.extra["pair"], torch.stack([number_BN, -number_BN], -1))
    assert kept.index_BN.tolist() == [[6, 0, 2], [1, 5, 4]]


def test_state_of_merged_tokens() -> None:
    r = Reduction.merge(
        torch.tensor([1, 0, 1, -1]), 2, torch.tensor([1.0, 1.0, 3.0, 1.0]), torch.tensor([1, 2])
    )
    out = labelled(1, 4).reduce(r)
    assert out.x_BND.tolist() == [[[1.0], [1.5]]]
    assert out.size_BN.tolist() == [[2.0, 4.0]], "sizes 1 + 3, weights do not matter"
    assert out.position_BN3[0, :, 0].tolist() == [1, 2], "the anchor's place"
    assert out.extra["score"].tolist() == [[10.0, 20.0]]
    assert out.protected_BN.tolist() == [[False, True]]


@given(st.integers(1, 8), st.integers(0, 999))
def test_sizes_of_composed_merges_count_sources(num: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    tokens = Tokens(torch.randn(2, num, 3, generator=g))
    for _ in range(3):
        n = tokens.num_tokens
        m = int(torch.randint(1, n + 1, (), generator=g))
        every_target_has_one = torch.cat(
            [torch.arange(m), torch.randint(0, m, (n - m,), generator=g)]
        )
        assignment = every_target_has_one[torch.randperm(n, generator=g)].expand(2, -1)
        size = tokens.size_BN
        tokens = tokens.reduce(Reduction.merge(assignment, m, size))
    assert tokens.reduction is not None
    counted = torch.stack(
        [g_N.bincount(minlength=tokens.num_tokens) for g_N in tokens.reduction.groups_BN]
    )
    assert torch.equal(tokens.size_BN, counted.float())
    # Weighted by size, merging in steps is averaging all sources at once.
    torch.testing.assert_close(tokens.reduction.matrix().sum(2), torch.ones(2, tokens.num_tokens))
    assert torch.equal(tokens.reduction.matrix() > 0, tokens.reduction.matrix() > 1e-3)
    largest, smallest = tokens.reduction.matrix().max(2).values, 1 / tokens.size_BN
    torch.testing.assert_close(largest, smallest)


def test_the_reduction_so_far_leads_back_to_the_source() -> None:
    x = torch.randn(1, 6, 3)
    tokens = Tokens(x).reduce(Reduction.select(torch.tensor([1, 3, 5]), 6))
    tokens = tokens.reduce(Reduction.merge(torch.tensor([0, 1, 1]), 2))
    assert tokens.reduction is not None
    assert torch.equal(tokens.x_BND, tokens.reduction.apply(x))
    assert tokens.reduction.groups_BN.tolist() == [[-1, 0, -1, 1, -1, 1]]
    assert Tokens(x).index_BN.tolist() == [[0, 1, 2, 3, 4, 5]]


class TestValidity:
    mask = torch.tensor([[True, True, True], [True, True, False]])

    def test_ragged_selection_makes_a_mask(self) -> None:
        r = Reduction.select(torch.tensor([[0, 2], [1, -1]]), 3)
        assert Tokens(torch.ones(2, 3, 1)).reduce(r).mask_BN.tolist() == [[1, 1], [1, 0]]
        both = Tokens(torch.ones(2, 3, 1), self.mask).reduce(
            Reduction.select(torch.tensor([[0, 2], [2, -1]]), 3)
        )
        assert both.mask_BN.tolist() == [[True, True], [False, False]]

    def test_new_tokens_are_valid_in_a_padded_batch(self) -> None:
        new = Reduction.synthesise(torch.ones(2, 4, 1), 3)
        assert Tokens(torch.ones(2, 3, 1), self.mask).reduce(new).mask_BN.all()
        assert Tokens(torch.ones(2, 3, 1)).reduce(new).mask_BN is None

    def test_a_hidden_target_is_never_valid(self) -> None:
        hidden = torch.tensor([[True, False], [True, True]])
        r = Reduction.synthesise(torch.ones(2, 2, 1), 3, mask_BM=hidden)
        assert Tokens(torch.ones(2, 3, 1), self.mask).reduce(r).mask_BN.tolist() == hidden.tolist()


def test_synthesised_features_survive_a_later_step() -> None:
    tokens = labelled(1, 5).reduce(Reduction.synthesise(torch.tensor([[5.0], [7.0]]), 5))
    assert tokens.size_BN.tolist() == [[1.0, 1.0]] and tokens.kind_BN.tolist() == [[0, 0]]
    last = tokens.reduce(Reduction.merge(torch.tensor([0, 0]), 1))
    assert last.x_BND.tolist() == [[[6.0]]]
    # The composed reduction alone gives the same tokens, from the source.
    assert last.reduction is not None
    assert torch.equal(labelled(1, 5).reduce(last.reduction).x_BND, last.x_BND)


class TestFromGrid:
    grid = Grid((Plane(2, 2, row_newline=True, prefix=1),), newlines_at_end=1)

    @pytest.mark.parametrize("shape", [(8, 3), (1, 8, 3)])
    def test_one_item(self, shape: tuple[int, ...]) -> None:
        tokens = Tokens.from_grid(torch.zeros(shape), self.grid)
        assert tokens.x_BND.shape == (1, 8, 3)
        assert torch.equal(tokens.position_BN3[0], self.grid.positions())
        assert (tokens.kind_BN[0] == TokenKind.NEWLINE).nonzero()[:, 0].tolist() == [3, 6, 7]

    @pytest.mark.parametrize("shape", [(7, 3), (1, 9, 3), (2, 8, 3), (8,), (1, 1, 8, 3)])
    def test_features_that_do_not_fit(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="describes 8 tokens of one item") as caught:
            Tokens.from_grid(torch.zeros(shape), self.grid)
        assert str(shape) in str(caught.value)


class TestErrors:
    def test_shapes(self) -> None:
        with pytest.raises(ValueError, match=r"\[B, N, D\], got \(4, 3\)"):
            Tokens(torch.zeros(4, 3))
        with pytest.raises(ValueError, match=r"size_BN has shape \(1, 5\).*\(1, 4\)"):
            Tokens(torch.zeros(1, 4, 3), size_BN=torch.zeros(1, 5))
        with pytest.raises(ValueError, match="score has shape"):
            Tokens(torch.zeros(1, 4, 3), extra={"score": torch.zeros(4)})
        with pytest.raises(ValueError, match=r"1 x \(4 -> 4\)\) does not lead to the \(1, 3\)"):
            Tokens(torch.zeros(1, 3, 3), reduction=Reduction.identity(4))

    @pytest.mark.parametrize("r", [Reduction.identity(5), Reduction.identity(4, batch=2)])
    def test_a_reduction_of_other_tokens(self, r: Reduction) -> None:
        with pytest.raises(ValueError, match="does not start at these 1 x 4 tokens"):
            Tokens(torch.zeros(1, 4, 3)).reduce(r)

    def test_a_synthesis_of_other_tokens(self) -> None:
        with pytest.raises(ValueError, match="does not start at these 1 x 4 tokens"):
            Tokens(torch.zeros(1, 4, 3)).reduce(Reduction.synthesise(torch.ones(2, 3), 5))


def test_repr_is_one_line() -> None:
    tokens = Tokens(torch.zeros(1, 4, 3, dtype=torch.bfloat16))
    assert repr(tokens) == "Tokens((1, 4, 3), bfloat16)"
    assert repr(tokens.reduce(Reduction.select(torch.tensor([1]), 4))).endswith(
        "Reduction(select, 1 x (4 -> 1)))"
    )
