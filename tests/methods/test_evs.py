"""EVS: the first frame, what changed, and exact counts."""

from __future__ import annotations

import pytest
import torch

from foveate.core import Budget, Count, Grid, Plane, ProjectorContext, TokenKind, Tokens
from foveate.methods.evs import EVS

from .helpers import LAYOUTS, item, reduce_item


def still(grid: Grid, channels: int = 8) -> torch.Tensor:
    """A video in which nothing moves, [T, L, D]."""
    T, height, width = grid.shape
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, height * width, channels, generator=generator).repeat(T, 1, 1)


def kept(x_TLD: torch.Tensor, grid: Grid, budget: Budget) -> list[int]:
    tokens = Tokens.from_grid(x_TLD.flatten(0, 1), grid)
    return reduce_item(EVS(), grid, budget, tokens).anchor_BM[0].tolist()


@pytest.mark.parametrize(
    ("frames", "retain", "tokens"),
    # Two to four temporal slices of 256 at retain 0.3, and 64 of them: only the first slice fits
    # at first, then three in ten of all tokens stay (vLLM counts 4915 by rounding down).
    [(2, 0.3, 256), (3, 0.3, 256), (4, 0.3, 307), (64, 0.3, 4915), (64, 0.25, 4096)],
)
def test_counts(frames: int, retain: float, tokens: int) -> None:
    grid = Grid.video(frames, 16, 16)
    assert EVS().count(grid, Budget(retain=retain)) == Count(tokens, exact=True)
    assert reduce_item(EVS(), grid, Budget(retain=retain)).num_out == tokens


def test_the_first_frame_stays_whole_and_changes_follow() -> None:
    grid = Grid.video(6, 4, 5)
    x_TLD = still(grid)
    x_TLD[3:, 7] = -x_TLD[3:, 7]  # turns round in frame 3 and stays so
    x_TLD[4, 11] = -x_TLD[4, 11]  # flickers in frame 4
    found = kept(x_TLD, grid, Budget(tokens=23))
    assert found == [*range(20), 3 * 20 + 7, 4 * 20 + 11, 5 * 20 + 11]


def test_a_needle_in_a_still_video_is_found() -> None:
    grid = LAYOUTS["video, newline at end"]
    x_TLD = still(grid)
    x_TLD[4, 13] = torch.randn(8, generator=torch.Generator().manual_seed(1))
    tokens = Tokens.from_grid(torch.cat([x_TLD.flatten(0, 1), torch.zeros(1, 8)]), grid)
    found = reduce_item(EVS(), grid, Budget(tokens=27), tokens).anchor_BM[0].tolist()
    assert found == [*range(25), 4 * 25 + 13, 5 * 25 + 13, 150]


def test_lengths_of_features_do_not_matter() -> None:
    grid = LAYOUTS["video"]
    x_ND = item(grid).x_BND[0]
    scale = torch.linspace(0.1, 9.0, grid.num_tokens)[:, None]
    both = [
        reduce_item(EVS(), grid, Budget(retain=0.4), Tokens.from_grid(x, grid)).anchor_BM
        for x in (x_ND, x_ND * scale)
    ]
    assert both[0].equal(both[1])


def test_ties_go_to_the_earlier_patch() -> None:
    grid = Grid.video(4, 2, 3)
    ones_TLD = torch.ones(4, 6, 4)
    assert kept(ones_TLD, grid, Budget(tokens=9)) == list(range(9))


def test_images_and_single_frames_pass() -> None:
    for grid in (LAYOUTS["image"], LAYOUTS["one frame"]):
        context = ProjectorContext(Budget(retain=0.2), grid=grid)
        assert EVS().projector(item(grid), context) is None
        assert EVS().count(grid, Budget(retain=0.2)) == Count(grid.num_tokens)


def test_newlines_and_cls_stay_on_top() -> None:
    grid = LAYOUTS["video, [CLS] per frame"]
    reduction = reduce_item(EVS(), grid, Budget(retain=0.3))
    kinds_M = grid.kinds()[reduction.anchor_BM[0]]
    assert (kinds_M == TokenKind.PATCH).sum() == 36 and (kinds_M == TokenKind.CLS).sum() == 6
    assert EVS().count(grid, Budget(retain=0.3)) == Count(36 + 6 + 1)
    rows = LAYOUTS["video, newline per row"]
    counted = EVS().count(rows, Budget(retain=0.3))
    assert not counted.exact
    assert reduce_item(EVS(), rows, Budget(retain=0.3)).num_out <= counted.tokens


def test_frames_of_different_sizes_are_refused() -> None:
    grid = Grid((Plane(2, 2), Plane(2, 3)), "video")
    with pytest.raises(ValueError, match=r"evs compares frames .* \[\(2, 2\), \(2, 3\)\]"):
        reduce_item(EVS(), grid, Budget(retain=0.5))
