"""M3: nested sizes, what a budget picks, and published counts."""

from __future__ import annotations

import pytest
import torch

from foveate.core import Budget, Grid, Plane, TokenKind, Tokens
from foveate.methods.m3 import M3, nested_kernels

from .helpers import item, reduce_item


def at(grid: Grid, tokens: int, x_ND: torch.Tensor, method: M3 | None = None) -> torch.Tensor:
    method = method or M3()
    reduction = reduce_item(method, grid, Budget(tokens=tokens), Tokens.from_grid(x_ND, grid))
    return reduction.apply(x_ND[None])[0]


@pytest.mark.parametrize(
    ("frames", "tokens"), [(5, 720), (5, 180), (5, 45), (5, 5), (1, 144), (1, 36), (1, 9), (1, 1)]
)
def test_published_counts(frames: int, tokens: int) -> None:
    grid = Grid.video(frames, 24, 24)
    counted = M3(strict=True).count(grid, Budget(tokens=tokens))
    assert (counted.tokens, counted.exact) == (tokens, True)


def test_sizes_of_siglip_grids() -> None:
    assert list(M3().scales(27, 27)) == [729, 81, 9, 1]
    assert list(M3().scales(14, 14)) == [196, 49, 16, 4, 1]
    assert list(M3().scales(5, 7)) == [35, 12, 4, 1]


@pytest.mark.parametrize(("height", "width"), [(24, 24), (27, 27), (24, 36), (5, 7), (13, 13)])
def test_coarser_cells_are_unions_of_finer_ones(height: int, width: int) -> None:
    grid = Grid.image(height, width)
    sizes = [size for size in M3().scales(height, width) if size < height * width]
    groups = [reduce_item(M3(), grid, Budget(tokens=s)).groups_BN[0] for s in sizes]
    for fine_N, coarse_N, size in zip(groups, groups[1:], sizes, strict=False):
        assert int(fine_N.max()) + 1 == size
        # Each fine cell lies in exactly one coarse cell.
        assert len(torch.stack([fine_N, coarse_N], 1).unique(dim=0)) == size
    assert nested_kernels(height, width)[-1] >= max(height, width)


def test_pooling_in_steps_is_pooling_at_once() -> None:
    grid = Grid.image(24, 24)
    x_ND = torch.randn(576, 8, generator=torch.Generator().manual_seed(0))
    fine = at(grid, 144, x_ND)
    torch.testing.assert_close(at(Grid.image(12, 12), 36, fine), at(grid, 36, x_ND))
    nine = at(grid, 9, x_ND)
    torch.testing.assert_close(nine.mean(0, keepdim=True), at(grid, 1, x_ND))
    for tokens in (144, 36, 9, 1):
        torch.testing.assert_close(at(grid, tokens, x_ND).mean(0), x_ND.mean(0))


def test_the_largest_size_that_fits() -> None:
    grid = Grid.image(24, 24)
    found = {s: M3().count(grid, Budget(tokens=s)).tokens for s in (575, 144, 143, 49, 8, 1)}
    assert found == {575: 144, 144: 144, 143: 36, 49: 36, 8: 1, 1: 1}
    assert M3(rule="released").count(grid, Budget(tokens=49)).tokens == 64
    assert M3().count(grid, Budget(retain=1 / 64)).tokens == 9


def test_strict_names_the_sizes() -> None:
    grid = Grid.image(24, 24)
    with pytest.raises(ValueError, match=r"no size of 100 tokens .*576, 144, 36, 9, 1"):
        M3(strict=True).count(grid, Budget(tokens=100))
    with pytest.raises(ValueError, match="no size of 58 tokens"):
        reduce_item(M3(strict=True), grid, Budget(retain=0.1))


def test_the_released_rule_drops_rows_and_columns_that_fill_no_cell() -> None:
    grid, x_ND = Grid.image(5, 7), torch.arange(35.0)[:, None]
    method = M3(rule="released")
    reduction = reduce_item(method, grid, Budget(tokens=8), Tokens.from_grid(x_ND, grid))
    assert reduction.num_out == 6 == method.count(grid, Budget(tokens=8)).tokens
    dropped_N = (reduction.groups_BN[0] < 0).view(5, 7)
    assert dropped_N[4].all() and dropped_N[:, 6].all() and not dropped_N[:4, :6].any()
    kept_all = reduce_item(M3(), grid, Budget(tokens=12), Tokens.from_grid(x_ND, grid))
    assert kept_all.num_out == 12 and bool((kept_all.groups_BN >= 0).all())


def test_one_newline_per_pooled_row() -> None:
    grid = Grid((Plane(4, 4), Plane(6, 8, row_newline=True)), newlines_at_end=1)
    reduction = reduce_item(M3(), grid, Budget(retain=0.25))
    kinds_M = grid.kinds()[reduction.anchor_BM[0]]
    assert kinds_M.tolist() == [0] * 4 + [0, 0, 0, 0, 1] * 3 + [1]
    assert (kinds_M == TokenKind.NEWLINE).sum() == 4
    assert M3().count(grid, Budget(retain=0.25)).tokens == reduction.num_out == 20


def test_a_needle_shows_in_its_cell_alone() -> None:
    grid = Grid.video(3, 8, 8)
    tokens = item(grid)
    moved = tokens.x_BND.clone()
    moved[0, 64 + 8 * 5 + 2] += 100.0  # frame 1, row 5, column 2
    both = [at(grid, 3 * 16, x_ND) for x_ND in (tokens.x_BND[0], moved[0])]
    changed = (both[1] - both[0]).abs().amax(1) > 1
    assert changed.nonzero()[:, 0].tolist() == [16 + 4 * 2 + 1]


def test_sizes_weigh() -> None:
    tokens = Tokens(
        torch.tensor([[[0.0], [4.0], [4.0], [4.0]]]), size_BN=torch.tensor([[3.0, 1.0, 1.0, 1.0]])
    )
    out = tokens.reduce(reduce_item(M3(), Grid.image(2, 2), Budget(tokens=1), tokens))
    assert out.x_BND.tolist() == [[[2.0]]] and out.size_BN is not None
    assert out.size_BN.tolist() == [[6.0]]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="kernels are sides"):
        M3(kernels=(0, 2))
    with pytest.raises(ValueError, match="kernels are sides"):
        M3(kernels=())
    with pytest.raises(ValueError, match="rule must be"):
        M3(rule="floor")  # type: ignore[arg-type]
    assert M3(kernels=[1, 2]) == M3(kernels=(1, 2))  # type: ignore[arg-type]
