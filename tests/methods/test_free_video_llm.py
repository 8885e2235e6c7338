"""Free Video-LLM: paths, frames, boxes and budgets."""

from __future__ import annotations

import math

import pytest
import torch

from foveate.core import Budget, Grid, Plane, ProjectorContext, Reduction, Tokens
from foveate.methods.free_video_llm import (
    PUBLISHED,
    FreeVideoLLM,
    Paths,
    partners,
    pooled_shape,
    region_boxes,
    top_change_frames,
)
from foveate.ops import average_matrix

from .helpers import item

DEFAULT = Budget(retain=FreeVideoLLM.card.retain, published=True)
TWO_PATHS = "slow_{}frms_spatial_1d_max_pool_roi{}-middle_0frms_spatial_1d_max_pool_24x12-fast_{}"


def context_of(grid: Grid, budget: Budget, seed: int = 0, **signals) -> ProjectorContext:
    generator = torch.Generator().manual_seed(seed)
    given = {
        "text.frame_similarity": torch.rand(1, len(grid.planes), generator=generator),
        "paired.text": torch.randn(1, 5, generator=generator),
        "paired.patches": torch.randn(1, grid.num_tokens, 5, generator=generator),
        **signals,
    }
    return ProjectorContext(budget, "free_video_llm", grid=grid, read=given.get)


def reduce_video(grid: Grid, budget: Budget, tokens: Tokens | None = None, **arguments):
    signals = arguments.pop("signals", {})
    context = context_of(grid, budget, **signals)
    tokens = item(grid) if tokens is None else tokens
    method = FreeVideoLLM(**arguments)
    reduction = method.projector(tokens, context)
    assert reduction is not None
    counted = method.count(grid, budget)
    assert counted.exact and counted.tokens == reduction.num_out
    return reduction


def test_published_counts() -> None:
    grid = Grid.video(50, 24, 24)
    paths = FreeVideoLLM().paths(grid, DEFAULT)
    assert paths is not None and math.prod(paths.box(pooled_shape(24, 24))) == 231
    assert paths.box(pooled_shape(24, 24, "code")) == (11, 21)
    assert FreeVideoLLM().count(grid, DEFAULT).tokens == 3 * 231 + 5 * 231 + 800 == 2648
    assert FreeVideoLLM(layout="code").count(grid, DEFAULT).tokens == 2648
    # What the card calls its budget is that of the published spec.
    assert FreeVideoLLM().count(grid, Budget(retain=FreeVideoLLM.card.retain)).tokens == 2648


@pytest.mark.parametrize("shape", [(50, 24, 24), (32, 14, 14), (16, 4, 4), (8, 5, 7), (2, 3, 3)])
@pytest.mark.parametrize("layout", ["true", "code"])
def test_budgets_are_not_exceeded_and_nearly_used(shape: tuple, layout: str) -> None:
    grid = Grid.video(*shape)
    if layout == "code" and shape[1] % 2:
        with pytest.raises(ValueError, match="rows are odd"):
            FreeVideoLLM(layout="code").count(grid, Budget(retain=0.5))
        return
    method, last = FreeVideoLLM(layout=layout), 0
    for keep in sorted({1, 2, 3, *range(5, grid.num_patches, max(1, grid.num_patches // 60))}):
        tokens = method.count(grid, Budget(tokens=keep)).tokens
        assert 1 <= tokens <= keep
        paths = method.paths(grid, Budget(tokens=keep))
        assert paths is not None and max(paths.slow, paths.middle, paths.fast) <= shape[0]
        if keep >= shape[0] and paths.slow + paths.middle < 2 * shape[0]:
            detail = math.prod(paths.box(pooled_shape(*shape[1:], layout)))
            assert keep - tokens < max(detail, shape[0] * (paths.rows + paths.columns + 1))
        last = tokens
    assert last > grid.num_patches // 3
    assert method.count(grid, Budget(tokens=grid.num_patches)).tokens == grid.num_patches


def test_a_spec_of_more_tokens_than_the_video_leaves_it_alone() -> None:
    grid = Grid.video(2, 3, 3)
    assert FreeVideoLLM().count(grid, DEFAULT).tokens == grid.num_tokens
    assert FreeVideoLLM().projector(item(grid), context_of(grid, DEFAULT)) is None


def test_images_are_left_alone() -> None:
    grid = Grid.image(8, 8)
    assert FreeVideoLLM().count(grid, Budget(retain=0.2)).tokens == 64
    assert FreeVideoLLM().projector(item(grid), context_of(grid, Budget(retain=0.2))) is None


@pytest.mark.parametrize("needle", [0, 7, 19])
def test_the_frame_of_the_text_is_sharp(needle: int) -> None:
    grid = Grid.video(20, 6, 6)
    score_1T = torch.rand(1, 20, generator=torch.Generator().manual_seed(1))
    score_1T[0, needle] = 2.0
    signals = {"text.frame_similarity": score_1T}
    reduction = reduce_video(grid, Budget(tokens=60), signals=signals)
    paths = FreeVideoLLM().paths(grid, Budget(tokens=60))
    assert paths is not None and paths.slow >= 1
    sharp = paths.slow * math.prod(paths.box(pooled_shape(6, 6)))
    times = grid.positions()[reduction.anchor_BM[0, :sharp], 0]
    assert needle in times.tolist() and times.diff().ge(0).all()


@pytest.mark.parametrize("corner", [(0, 0), (0, 4), (6, 2), (5, 8)])
def test_the_block_of_the_text_is_inside_the_box(corner: tuple[int, int]) -> None:
    grid = Grid.video(3, 12, 12)
    text_E = torch.tensor([1.0, 0, 0, 0])
    row, column = corner
    # The farther from the block, the less alike.
    y, x = torch.arange(12.0)[:, None], torch.arange(12.0)
    away_yx = (row - y).clamp(min=0) + (y - row - 3).clamp(min=0)
    away_yx = away_yx + (column - x).clamp(min=0) + (x - column - 3).clamp(min=0)
    patches_TyxE = torch.zeros(3, 12, 12, 4)
    patches_TyxE[..., 0], patches_TyxE[..., 1] = 1, away_yx
    signals = {"paired.text": text_E[None], "paired.patches": patches_TyxE.view(1, -1, 4)}
    spec = TWO_PATHS.format(3, 4, "3frms_1x1")
    reduction = reduce_video(grid, DEFAULT, spec=spec, signals=signals)
    fed_N = reduction.matrix()[0, :-3].sum(0) > 0
    inside_Tyx = fed_N.view(3, 12, 12)
    block = inside_Tyx[:, row : row + 4, column : column + 4]
    assert block.float().mean() == 1


def test_boxes_stay_inside_and_keep_their_size() -> None:
    similarity_FP = torch.randn(200, 96, generator=torch.Generator().manual_seed(0))
    for roi in range(1, 10):
        paths = Paths(1, 1, 1, 1, 1, roi)
        rows, columns = box = paths.box((12, 8))
        left_F, top_F = region_boxes(similarity_FP, (12, 8), box, roi).unbind(1)
        assert left_F.min() >= 0 and int(left_F.max()) + columns <= 8
        assert top_F.min() >= 0 and int(top_F.max()) + rows <= 12
        assert abs(rows * columns - 96 * roi / 10) <= (rows + columns) / 2 + 1


def test_roi_10_crops_nothing_and_reads_no_patches() -> None:
    grid = Grid.video(3, 4, 4)
    tokens = item(grid)
    spec = TWO_PATHS.format(1, 10, "3frms_2x2")
    signals = {"paired.patches": None, "paired.text": None}
    reduction = reduce_video(grid, DEFAULT, tokens, spec=spec, signals=signals)
    x_TyxD = tokens.x_BND[0].view(3, 4, 4, -1)
    best = int(context_of(grid, DEFAULT).signal("text.frame_similarity")[0].argmax())
    sharp = x_TyxD[best].unflatten(1, (2, 2)).amax(2).flatten(0, 1)
    assert torch.equal(reduction.features_BMD[0, :8], sharp)
    pooled = torch.nn.functional.adaptive_avg_pool2d(x_TyxD.permute(0, 3, 1, 2), (2, 2))
    expected = pooled.permute(0, 2, 3, 1).flatten(0, 2)
    torch.testing.assert_close(reduction.features_BMD[0, 8:], expected)


def test_provenance_is_averages_of_what_was_pooled() -> None:
    grid = Grid.video(5, 5, 7, newlines_at_end=1)
    reduction = reduce_video(grid, Budget(tokens=90))
    matrix_MN = reduction.matrix()[0]
    torch.testing.assert_close(matrix_MN.sum(1), torch.ones(reduction.num_out))
    assert (matrix_MN.gather(1, reduction.anchor_BM[0, :, None]) > 0).all()
    assert reduction.anchor_BM[0, -1] == grid.num_tokens - 1
    dense = Reduction.synthesise(reduction.features_BMD, grid.num_tokens, reduction.matrix())
    size = torch.ones(1, grid.num_tokens)
    torch.testing.assert_close(reduction.sizes(size), dense.sizes(size))
    assert torch.equal(reduction.groups_BN, dense.groups_BN)


def test_permuted_frames_are_chosen_alike() -> None:
    order = torch.randperm(12, generator=torch.Generator().manual_seed(4))
    score_1T = torch.rand(1, 12, generator=torch.Generator().manual_seed(5))
    grid, spec = Grid.video(12, 4, 4), TWO_PATHS.format(3, 10, "4frms_1x1")
    chosen = []
    for turned in (torch.arange(12), order):
        signals = {"text.frame_similarity": score_1T[:, turned]}
        reduction = reduce_video(grid, DEFAULT, spec=spec, signals=signals)
        times = grid.positions()[reduction.anchor_BM[0], 0]
        chosen.append([sorted(turned[t].unique().tolist()) for t in (times[:24], times[24:])])
    assert chosen[0] == chosen[1]


def test_change_instead_of_text() -> None:
    grid = Grid.video(8, 4, 4)
    x_TLD = torch.ones(8, 16, 6)
    x_TLD[3:, :, 0], x_TLD[6:, :, 1] = -3.0, 5.0
    assert top_change_frames(x_TLD, 3).tolist() == [0, 3, 6]
    spec = TWO_PATHS.format(3, 10, "8frms_1x1")
    tokens = Tokens.from_grid(x_TLD.view(1, -1, 6), grid)
    signals = {"text.frame_similarity": None}
    reduction = reduce_video(grid, DEFAULT, tokens, spec=spec, choose_by="change", signals=signals)
    times = grid.positions()[reduction.anchor_BM[0, :24], 0]
    assert times.unique().tolist() == [0, 3, 6]


@pytest.mark.parametrize(("height", "width"), [(4, 6), (3, 5), (1, 1), (5, 2)])
def test_pairs_cover_the_frame_once(height: int, width: int) -> None:
    pair_P2 = partners(height, width)
    assert len(pair_P2) == math.prod(pooled_shape(height, width))
    assert pair_P2.unique().tolist() == list(range(height * width))
    same_row = pair_P2 // width
    assert torch.equal(same_row[:, 0], same_row[:, 1])


@pytest.mark.parametrize(("length", "num"), [(24, 4), (14, 4), (7, 3), (5, 5), (1, 1)])
def test_averages_are_adaptive_pooling(length: int, num: int) -> None:
    x = torch.randn(1, 1, length, generator=torch.Generator().manual_seed(length))
    expected = torch.nn.functional.adaptive_avg_pool1d(x, num)[0, 0]
    torch.testing.assert_close(average_matrix(length, num) @ x[0, 0], expected)


def test_boxes_are_drawn_in_patches() -> None:
    from foveate.core.evidence import Notebook

    grid, seen = Grid.video(6, 5, 7), []
    context = context_of(grid, DEFAULT)
    context.notebook = Notebook("projector", (grid.num_tokens,), seen.append, grid=grid)
    reduction = FreeVideoLLM(spec=TWO_PATHS.format(2, 4, "6frms_1x1")).projector(
        item(grid), context
    )
    assert reduction is not None
    frames, boxes = seen
    assert [first for first, _ in frames.value] == [box[0] for box in boxes.value]
    sharp_MN = reduction.matrix()[0, :-6]
    for plane, top, left, bottom, right in boxes.value:
        shown_yx = (sharp_MN.sum(0).view(6, 5, 7)[plane] > 0).nonzero()
        assert shown_yx.amin(0).tolist() == [top, left]
        assert shown_yx.amax(0).tolist() == [bottom - 1, right - 1]


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("", "Cannot read the spec"),
        ("slow_3frms-fast_2frms_1x1", "Cannot read the spec"),
        (PUBLISHED + "x", "Cannot read the spec"),
        (PUBLISHED.replace("roi8", "roi0"), "roi is in tenths"),
        (PUBLISHED.replace("roi8", "roi11"), "roi is in tenths"),
        (PUBLISHED.replace("4x4", "0x4"), "fast grid needs"),
        (PUBLISHED.replace("1d_max", "2d_avg"), "only pooling is spatial_1d_max_pool"),
        (TWO_PATHS.format(0, 8, "0frms_1x1"), "needs a frame"),
    ],
)
def test_bad_specs(spec: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        FreeVideoLLM(spec=spec)


def test_bad_values() -> None:
    with pytest.raises(ValueError, match="layout must be"):
        FreeVideoLLM(layout="wrong")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="choose_by must be"):
        FreeVideoLLM(choose_by="all")  # type: ignore[arg-type]
    grid = Grid((Plane(4, 4), Plane(5, 4)), "video")
    with pytest.raises(ValueError, match="different sizes"):
        FreeVideoLLM().count(grid, Budget(retain=0.5))
