"""TDC: scenes and windows, counts, what a frame can reach, the overflow rule and a trained part."""

from __future__ import annotations

import pytest
import torch

from foveate.core import Budget, Grid, Plane, ProjectorContext, Reduction, Tokens
from foveate.methods.tdc import (
    TDC,
    TDCWeights,
    Windows,
    fitting_window,
    lay_out,
    most_windows,
    static_frames,
)

from .helpers import LAYOUTS, item

PUBLISHED = Budget(retain=TDC.card.retain, published=True)
VIDEOS = {name: grid for name, grid in LAYOUTS.items() if grid.modality == "video"}


def scenes(lengths: list[int], height: int = 3, width: int = 4, seed: int = 0) -> Tokens:
    """A video of constant scenes, and a little noise."""
    generator = torch.Generator().manual_seed(seed)
    T, L = sum(lengths), height * width
    base_SLD = torch.randn(len(lengths), L, 8, generator=generator)
    x_TLD = base_SLD.repeat_interleave(torch.tensor(lengths), dim=0)
    x_TLD = x_TLD + 0.01 * torch.randn(T, L, 8, generator=generator)
    return Tokens.from_grid(x_TLD.flatten(0, 1), Grid.video(T, height, width))


def run(method: TDC, tokens: Tokens, grid: Grid, budget: Budget = PUBLISHED) -> Reduction:
    made = method.projector(tokens, ProjectorContext(budget, grid=grid))
    assert made is not None
    return made


def frames_of_anchors(made: Reduction, grid: Grid) -> torch.Tensor:
    return torch.bincount(grid.positions()[made.anchor_BM[0], 0], minlength=len(grid.planes))


@pytest.mark.parametrize("cuts", [1, 5, 24])
def test_all_planted_cuts_are_found(cuts) -> None:
    lengths = [3 + number % 4 for number in range(cuts + 1)]
    tokens, grid = scenes(lengths), Grid.video(sum(lengths), 3, 4)
    windows = TDC(max_cuts=cuts).windows(
        tokens.x_BND[0].unflatten(0, (sum(lengths), 12)), grid, PUBLISHED
    )
    starts = torch.tensor([0, *lengths]).cumsum(0)[:-1].tolist()
    assert windows.static_T.nonzero()[:, 0].tolist() == starts


def test_count_is_the_sum_over_windows() -> None:
    lengths = [20, 3, 9, 1, 30]
    tokens, grid = scenes(lengths), Grid.video(63, 3, 4)
    method = TDC(max_cuts=4, context_tokens=2)
    made = run(method, tokens, grid)
    # Windows of scenes of 20, 3, 9, 1 and 30 frames: 3 + 1 + 2 + 1 + 4.
    assert made.num_out == 11 * 12 + 52 * 2
    bound = method.count(grid, PUBLISHED)
    assert not bound.exact and bound.tokens == most_windows(63, 5, 8) * 12 + (63 - 12) * 2
    whole = frames_of_anchors(made, grid) == 12
    assert whole.nonzero()[:, 0].tolist() == [0, 8, 16, 20, 23, 31, 32, 33, 41, 49, 57]
    # Whole frames are the input bit for bit, the order is that of time.
    out = made.apply(tokens.x_BND)[0]
    one = made.matrix()[0].max(1).values == 1
    assert out[one].equal(tokens.x_BND[0][made.anchor_BM[0][one]])
    assert (grid.positions()[made.anchor_BM[0], 0].diff() >= 0).all()


@pytest.mark.parametrize(("frames", "segments", "window"), [(30, 4, 8), (9, 9, 3), (12, 1, 5)])
def test_the_bound_on_windows_is_reached(frames, segments, window) -> None:
    most = 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        cut = torch.randperm(frames - 1, generator=generator)[: segments - 1].sort().values
        edge = torch.cat([torch.tensor([-1]), cut, torch.tensor([frames - 1])])
        bounds = torch.stack([edge[:-1] + 1, edge[1:]], 1)
        num = int(static_frames(bounds, window).sum())
        assert num <= most_windows(frames, segments, window)
        most = max(most, num)
        least = fitting_window(bounds, num)
        assert int(static_frames(bounds, least).sum()) <= num and least <= window
        if least > 1:
            assert int(static_frames(bounds, least - 1).sum()) > num
    assert most == most_windows(frames, segments, window)


def test_a_flash_reaches_its_own_tokens_alone() -> None:
    tokens, grid = scenes([40]), Grid.video(40, 3, 4)
    method = TDC(max_cuts=0, context_tokens=3)
    before = run(method, tokens, grid).apply(tokens.x_BND)[0]
    x_ND = tokens.x_BND.clone()
    x_ND[0, 13 * 12 + 5] += 3.0
    made = run(method, Tokens.from_grid(x_ND, grid), grid)
    changed = (made.apply(x_ND)[0] != before).any(1).nonzero()[:, 0]
    assert changed.tolist() == [58], "the second token of frame 13: 33 + 12 + 4 * 3 + 1"
    assert int(grid.positions()[made.anchor_BM[0, 58], 0]) == 13


def test_pooling_is_adaptive_average_along_row_major_order() -> None:
    tokens, grid = scenes([8], 3, 5), Grid.video(8, 3, 5)
    out = run(TDC(context_tokens=4), tokens, grid).apply(tokens.x_BND)[0]
    x_TLD = tokens.x_BND[0].unflatten(0, (8, 15))
    expected = torch.nn.functional.adaptive_avg_pool1d(x_TLD[1:].mT, 4).mT
    torch.testing.assert_close(out[15:], expected.flatten(0, 1))
    assert out[:15].equal(x_TLD[0])


@pytest.mark.parametrize("name", VIDEOS)
@pytest.mark.parametrize("retain", [0.005, 0.03, 0.1, 0.222, 0.5, 0.8, 0.95])
def test_a_budget_is_met_exactly(name, retain) -> None:
    grid, budget = VIDEOS[name], Budget(retain=retain)
    method = TDC()
    counted = method.count(grid, budget)
    made = run(method, item(grid), grid, budget)
    patches = int((grid.kinds()[made.anchor_BM[0]] == 0).sum())
    assert patches == max(1, budget.count(grid.num_patches))
    assert made.num_out <= counted.tokens
    assert counted.exact == (grid.planes[0].num_tokens == grid.planes[0].num_patches)


def test_a_budget_buys_scenes_before_windows() -> None:
    tokens, grid = scenes([5, 6, 5], 8, 9), Grid.video(16, 8, 9)
    counts = {}
    for retain in (0.05, 0.15, 0.34, 0.5):
        made = run(TDC(), tokens, grid, Budget(retain=retain))
        counts[retain] = frames_of_anchors(made, grid).tolist()
    assert max(counts[0.05]) < 72, "no room for a whole frame beside tokens of all others"
    assert set(counts[0.05]) == {3, 4}
    assert counts[0.15].index(72) == 0 and counts[0.15].count(72) == 1
    assert [t for t, n in enumerate(counts[0.34]) if n == 72] == [0, 5, 11]
    assert {0, 5, 11} < {t for t, n in enumerate(counts[0.5]) if n == 72}


def test_short_videos() -> None:
    tokens, grid = scenes([7, 9]), Grid.video(16, 3, 4)
    whole = TDC(short_videos="whole")
    assert whole.projector(tokens, ProjectorContext(PUBLISHED, grid=grid)) is None
    assert whole.count(grid, PUBLISHED).tokens == grid.num_tokens
    assert whole.count(grid, PUBLISHED).exact
    counts = frames_of_anchors(run(TDC(), tokens, grid), grid).tolist()
    # One cut for 16 frames, and a second window in the scene of 9.
    assert [t for t, n in enumerate(counts) if n == 12] == [0, 7, 15] and set(counts) == {1, 12}
    budget = Budget(retain=0.25)
    assert run(whole, tokens, grid, budget).num_out == whole.count(grid, budget).tokens == 48
    longer = Grid.video(30, 3, 4)
    for method in (TDC(), whole):
        static = frames_of_anchors(run(method, scenes([15, 15]), longer), longer) == 12
        assert static.sum() >= 25, "25 scenes of 30 frames, as published"


def test_too_many_tokens_are_cut_off_the_end_of_every_window() -> None:
    tokens, grid = scenes([8, 8, 2]), Grid.video(18, 3, 4)
    free, most = TDC(max_cuts=2, context_tokens=2), 60
    method = TDC(max_cuts=2, context_tokens=2, max_tokens=most)
    made, full = run(method, tokens, grid), run(free, tokens, grid)
    # Windows of 26, 26 and 14 tokens are 66: two fewer each.
    assert full.num_out == 66 and made.num_out == 60
    expected = torch.cat([part[:-2] for part in full.anchor_BM[0].split([26, 26, 14])])
    assert made.anchor_BM[0].equal(expected)
    assert method.count(grid, PUBLISHED).tokens == most
    # What a window does not have is cut off the end of the video; windows may vanish.
    tiny = run(TDC(max_cuts=2, context_tokens=2, max_tokens=7), tokens, grid)
    assert tiny.anchor_BM[0].tolist() == [*range(6), 8 * 12]
    one = run(TDC(max_cuts=2, context_tokens=2, max_tokens=1), tokens, grid)
    assert one.anchor_BM[0].tolist() == [0]
    closed = Grid.video(18, 3, 4, newlines_at_end=1)
    x_ND = torch.cat([tokens.x_BND[0], torch.ones(1, 8)])
    assert run(method, Tokens.from_grid(x_ND, closed), closed).num_out == 61


def test_specials_of_whole_frames_stay() -> None:
    grid = Grid((Plane(2, 3, row_newline=True, prefix=1),) * 9, "video", newlines_at_end=1)
    made = run(TDC(max_cuts=0, context_tokens=1), item(grid), grid)
    assert frames_of_anchors(made, grid).tolist() == [9, *[1] * 7, 9 + 1]
    assert made.num_out == TDC(max_cuts=0, context_tokens=1).count(grid, PUBLISHED).tokens
    kinds = grid.kinds()[made.anchor_BM[0]]
    assert (kinds != 0).sum() == 2 * 3 + 1


def halves(query_fKD: torch.Tensor, x_fLD: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(query_fKD + x_fLD.mean(1, keepdim=True), dim=-1)


@pytest.mark.parametrize("budget", [PUBLISHED, Budget(retain=0.2), Budget(tokens=5)])
def test_trained_parts(budget) -> None:
    tokens, grid = scenes([8, 8]), Grid.video(16, 3, 4, newlines_at_end=1)
    x_ND = torch.cat([tokens.x_BND[0], torch.ones(1, 8)])
    method = TDC(weights=TDCWeights(halves, torch.full((8,), 7.0)), max_cuts=1, context_tokens=2)
    made = run(method, Tokens.from_grid(x_ND, grid), grid, budget)
    assert made.features_BMD is not None
    x_MD = made.features_BMD[0]
    assert made.num_out <= method.count(grid, budget).tokens
    is_sep = (x_MD == 7.0).all(1)
    frames = frames_of_anchors(made, grid)
    assert int(is_sep.sum()) == int((frames > 0).sum())
    assert is_sep[-2] and x_MD[-1].equal(x_ND[-1])
    own = made.matrix()[0].max(1).values == 1
    compressed = ~own & ~is_sep
    torch.testing.assert_close(x_MD[compressed].norm(dim=1), torch.ones(int(compressed.sum())))
    plain = TDC(max_cuts=1, context_tokens=2)
    alike = run(plain, Tokens.from_grid(x_ND, grid), grid, budget).matrix()[0]
    torch.testing.assert_close(made.matrix()[0][~is_sep], alike)


def test_a_compressor_of_another_shape_is_named() -> None:
    tokens, grid = scenes([8]), Grid.video(8, 3, 4)
    weights = TDCWeights(lambda query_fKD, x_fLD: query_fKD[:, :1])
    with pytest.raises(ValueError, match=r"\(7, 2, 8\), got \(7, 1, 8\)"):
        run(TDC(weights=weights, context_tokens=2), tokens, grid)


def test_a_separator_of_another_width_is_named() -> None:
    tokens, grid = scenes([8]), Grid.video(8, 3, 4)
    weights = TDCWeights(halves, torch.zeros(7))
    with pytest.raises(ValueError, match=r"\[D\] = \(8,\), got \(7,\)"):
        run(TDC(weights=weights), tokens, grid)
    assert str(TDCWeights(halves)) == "TDCWeights(...)"


def test_gradients_reach_a_trained_compressor() -> None:
    tokens, grid = scenes([8]), Grid.video(8, 3, 4)
    layer = torch.nn.Linear(8, 8)
    static_T = torch.arange(8) == 0
    windows = Windows(static_T, torch.zeros(8, dtype=torch.long), torch.where(static_T, 12, 2))
    weights = TDCWeights(lambda query_fKD, x_fLD: layer(query_fKD))
    made = lay_out(tokens, grid, windows, weights)
    assert made.features_BMD is not None
    made.features_BMD.sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0


def test_images_stay_and_sizes_must_agree() -> None:
    image = LAYOUTS["image"]
    assert TDC().projector(item(image), ProjectorContext(PUBLISHED, grid=image)) is None
    mixed = Grid((Plane(2, 2), Plane(3, 3)), "video")
    with pytest.raises(ValueError, match="frames of one size"):
        run(TDC(), item(mixed), mixed, Budget(retain=0.5))


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_cuts": -1},
        {"window": 0},
        {"context_tokens": 0},
        {"max_tokens": 0},
        {"short_videos": "never"},
    ],
)
def test_bad_arguments(arguments) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        TDC(**arguments)


@pytest.mark.parametrize("budget", [PUBLISHED, Budget(retain=0.2), Budget(tokens=5)])
def test_the_default_device_does_not_matter(budget) -> None:
    tokens, grid = scenes([8, 8]), Grid.video(16, 3, 4)
    expected = run(TDC(), tokens, grid, budget)
    assert not expected.anchor_BM.is_meta
    with torch.device("meta"):
        made = run(TDC(), tokens, grid, budget)
    assert made.anchor_BM.equal(expected.anchor_BM)
    assert made.apply(tokens.x_BND).equal(expected.apply(tokens.x_BND))
