"""B-VLLM without training: rows by the question, what is joined, places, counts and a needle."""

from __future__ import annotations

import pytest
import torch

from foveate import ops
from foveate.core import Budget, Grid, ProjectorContext, Reduction, Tokens
from foveate.core.evidence import Notebook
from foveate.methods.b_vllm import (
    BVLLM,
    condense,
    join_rows,
    row_similarity,
    row_windows,
    soft_selector,
)

from .helpers import LAYOUTS, item

GRID = Grid.video(24, 3, 4)


def run(
    method: BVLLM,
    score_T: torch.Tensor | None = None,
    keep: int = 48,
    grid: Grid = GRID,
    tokens: Tokens | None = None,
    **more: object,
) -> Reduction:
    """The projector stage on relevances of frames."""
    if score_T is None:
        score_T = torch.rand(len(grid.planes), generator=torch.Generator().manual_seed(1))
    context = ProjectorContext(
        Budget(tokens=keep), grid=grid, read={"text.frame_similarity": score_T[None]}.get, **more
    )
    reduction = method.projector(item(grid) if tokens is None else tokens, context)
    assert reduction is not None
    return reduction


def frames_fed(reduction: Reduction, grid: Grid = GRID) -> torch.Tensor:
    """Weight of every frame in every token, [M, T]."""
    matrix_MN = reduction.matrix()[0][:, grid.patch_index()]
    return matrix_MN.unflatten(1, (len(grid.planes), -1)).sum(2)


# -- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 2, 5, 33])
def test_every_stretch_has_a_frame_whatever_the_shares(T) -> None:
    generator = torch.Generator().manual_seed(T)
    drawn = torch.rand(T, generator=generator)
    spike = torch.full((T,), 1e-30)
    spike[T // 2] = 1.0
    steep = torch.softmax(torch.arange(T) * 40.0, 0)
    for share_T in (drawn, drawn**30, torch.ones(T), spike, steep, torch.zeros(T)):
        for num in range(1, T + 1):
            row_T = row_windows(share_T, num)
            assert row_T[0] == 0 and row_T[-1] == num - 1
            assert set(row_T.diff().tolist()) <= {0, 1}, (share_T, num)


def test_even_relevance_makes_even_stretches() -> None:
    assert torch.bincount(row_windows(torch.ones(24), 6)).tolist() == [4] * 6
    assert row_windows(torch.full((9,), 0.3), 9).tolist() == list(range(9))


def test_relevant_times_have_more_rows() -> None:
    share_T = torch.ones(40)
    share_T[10:20] = 6.0
    row_T = row_windows(share_T, 12)
    inside = len(set(row_T[10:20].tolist()))
    assert inside >= 7 > 12 * 10 / 40
    reversed_T = row_windows(share_T.flip(0), 12)
    assert len(set(reversed_T[20:30].tolist())) in (inside - 1, inside, inside + 1)


def test_a_frame_that_would_fill_rows_alone_leaves_the_rest_to_others() -> None:
    share_T = torch.full((30,), 1.0)
    share_T[7] = 1e6
    row_T = row_windows(share_T, 6)
    size_K = torch.bincount(row_T)
    assert int(size_K[row_T[7]]) <= 2
    assert int(size_K.max()) <= 7, "the others share five rows evenly"


def test_rows_of_the_selector_add_up_to_one_and_noise_changes_them() -> None:
    logits_KT = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    selector_KT = soft_selector(logits_KT)
    torch.testing.assert_close(selector_KT.sum(1), torch.ones(5))
    assert not torch.equal(
        soft_selector(logits_KT, noise_KT=ops.gumbel_noise(logits_KT)), selector_KT
    )
    sharp = soft_selector(logits_KT, tau=0.01)
    assert (
        sharp.argmax(1).equal(logits_KT.argmax(1)) and (sharp.amax(1) > selector_KT.amax(1)).all()
    )


def test_the_published_numbers_of_rows_and_tokens() -> None:
    method = BVLLM()
    assert method.num_rows(32, 576, 576) == 16
    assert method.count(Grid.video(16, 24, 24), Budget(retain=method.card.retain)).tokens == 576
    # Never more rows than half the frames, unless whole frames are asked for.
    assert [method.num_rows(T, 100, 50) for T in (1, 2, 8, 31, 32, 900)] == [1, 1, 4, 16, 16, 16]
    assert method.num_rows(900, 100, 45_000) == 450
    assert method.num_rows(900, 100, 3) == 3


# -- joining --------------------------------------------------------------------------------------


def test_identical_rows_collapse_to_the_first() -> None:
    same_KK = torch.ones(6, 6)
    joined = join_rows(ops.duplicate_links(same_KK, 0.75))
    assert joined.anchor_BM.tolist() == [[0]]
    torch.testing.assert_close(joined.matrix()[0], torch.full((1, 6), 1 / 6))
    none = join_rows(ops.duplicate_links(same_KK, 1.0))
    assert none.num_out == 6


def test_following_chains_conserves_the_mean_and_dropping_loses_it() -> None:
    x_1KD = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    link_K = torch.tensor([-1, 0, 1, -1, 3, 2])
    followed, dropped = join_rows(link_K), join_rows(link_K, "drop")
    torch.testing.assert_close(followed.apply(x_1KD)[0, 0], x_1KD[0, [0, 1, 2, 5]].mean(0))
    torch.testing.assert_close(dropped.apply(x_1KD)[0, 0], x_1KD[0, [0, 1]].mean(0))
    assert followed.sizes(torch.ones(1, 6)).sum() == 6 > dropped.sizes(torch.ones(1, 6)).sum()
    flat = torch.tensor([-1, 0, 0, -1])
    assert join_rows(flat).matrix().equal(join_rows(flat, "drop").matrix())


def test_a_still_video_becomes_as_few_rows_as_hold_the_budget() -> None:
    """All rows show the same picture, so that all but those the budget needs are joined."""
    draw_LD = torch.randn(12, 16, generator=torch.Generator().manual_seed(0))
    tokens = Tokens.from_grid(draw_LD.repeat(24, 1), GRID)
    for keep, rows in ((6, 1), (12, 1), (13, 2), (60, 5)):
        reduction = run(BVLLM(), keep=keep, tokens=tokens)
        assert reduction.num_out == keep
        times = GRID.positions()[reduction.anchor_BM[0], 0]
        assert len(times.unique()) == rows, keep
    torch.testing.assert_close(run(BVLLM(), keep=12, tokens=tokens).apply(tokens.x_BND)[0], draw_LD)


def test_a_cut_is_not_joined_over() -> None:
    generator = torch.Generator().manual_seed(0)
    first_LD, second_LD = torch.randn(2, 12, 16, generator=generator)
    x_TLD = torch.stack([first_LD] * 12 + [second_LD] * 12)
    tokens = Tokens.from_grid(x_TLD.flatten(0, 1), GRID)
    reduction = run(BVLLM(), torch.ones(24), keep=12, tokens=tokens)
    fed_MT = frames_fed(reduction)
    shots = torch.stack([fed_MT[:, :12].sum(1), fed_MT[:, 12:].sum(1)], 1)
    assert shots.amin(1).max() == 0, "no token mixes the two shots"
    assert shots.amax(1).allclose(torch.ones(12))
    apart = run(BVLLM(threshold=1.0), torch.ones(24), keep=12, tokens=tokens)
    assert len(GRID.positions()[apart.anchor_BM[0], 0].unique()) == 12


def test_all_earlier_rows_or_only_neighbours() -> None:
    """A scene that comes back: only "all" joins it to its first showing."""
    generator = torch.Generator().manual_seed(0)
    a_LD, b_LD = torch.randn(2, 12, 16, generator=generator)
    y_KLD = torch.stack([a_LD, b_LD, a_LD, a_LD])
    links = [
        ops.duplicate_links(row_similarity(y_KLD, compare), 0.75).tolist()
        for compare in ("neighbours", "all")
    ]
    assert links == [[-1, -1, -1, 2], [-1, -1, 0, 0]]
    assert row_similarity(y_KLD[:1]).shape == (1, 1)
    shifted = [row_similarity(y_KLD + shift, "all") for shift in (0.0, 50.0)]
    torch.testing.assert_close(*shifted, atol=1e-4, rtol=0, msg="what all share does not count")


# -- patches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("num", range(1, 14))
def test_patches_are_merged_down_exactly(num) -> None:
    """Odd counts, too, where the released arithmetic leaves one too many."""
    x_BLD = torch.randn(2, 13, 5, generator=torch.Generator().manual_seed(0))
    for order in ("raster", "released"):
        merged = condense(x_BLD, num, order)
        assert merged.num_out == num
        torch.testing.assert_close(merged.matrix().sum(2), torch.ones(2, num))
    places = condense(x_BLD, num).anchor_BM
    assert (places.diff(dim=1) > 0).all()


# -- the whole stage ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in LAYOUTS if "video" in name])
@pytest.mark.parametrize(
    "method",
    [
        BVLLM(),
        BVLLM(order="released", compare="all", threshold=0.5),
        BVLLM(chains="drop", threshold=0.3),
        BVLLM(noise=True),
        BVLLM(queries=2),
    ],
    ids=str,
)
def test_budget_order_and_averages(name, method) -> None:
    grid = LAYOUTS[name]
    for keep in (1, 3, 11, 40, grid.num_patches - 1):
        reduction = run(method, keep=keep, grid=grid)
        counted = method.count(grid, Budget(tokens=keep))
        assert reduction.num_out <= counted.tokens
        assert reduction.num_out == counted.tokens or not counted.exact
        assert reduction.kind == "merge", "O(N) memory: every patch feeds at most one token"
        torch.testing.assert_close(reduction.matrix()[0].sum(1), torch.ones(reduction.num_out))
        position_M3 = grid.positions()[reduction.anchor_BM[0]]
        assert (position_M3[:, 0].diff() >= 0).all(), "rows in the order of time"
        if method.order == "raster":
            assert (reduction.anchor_BM[0].diff() > 0).all()
        if method.chains == "follow":
            fed = (reduction.groups_BN[0][grid.patch_index()] >= 0).all()
            assert bool(fed), "every patch is part of a token"


def test_a_token_is_the_product_of_both_mixtures() -> None:
    """Frames first, then patches: the same as the one matrix."""
    method, score_T = BVLLM(threshold=1.0), torch.linspace(0, 1, 24)
    tokens = item(GRID)
    reduction = run(method, score_T, keep=48, tokens=tokens)
    logits_T = (score_T.double() - score_T.double().mean()) / score_T.double().std(correction=0)
    row_T = row_windows(torch.softmax(logits_T / 0.5, 0), 12)
    is_seen_KT = row_T == torch.arange(12)[:, None]
    selector_KT = soft_selector(logits_T.where(is_seen_KT, -torch.inf))
    y_KLD = torch.einsum("kt,tld->kld", selector_KT, tokens.x_BND[0].unflatten(0, (24, 12)))
    expected_MD = condense(y_KLD, 4).apply(y_KLD).flatten(0, 1)
    torch.testing.assert_close(reduction.apply(tokens.x_BND)[0], expected_MD, atol=1e-5, rtol=0)
    torch.testing.assert_close(frames_fed(reduction)[::4], selector_KT)


def test_needle() -> None:
    """One frame that fits the question has more than 0.9 of a row, at every place and length."""
    for T in (8, 24, 100):
        grid = Grid.video(T, 2, 2)
        for needle in (0, T // 3, T - 1):
            score_T = torch.full((T,), 0.1)
            score_T[needle] = 0.3
            fed_MT = frames_fed(run(BVLLM(threshold=1.0), score_T, keep=T, grid=grid), grid)
            assert float(fed_MT[:, needle].max()) > 0.9


def test_equal_relevance_averages_a_stretch() -> None:
    fed_MT = frames_fed(run(BVLLM(threshold=1.0), torch.full((24,), 0.37), keep=12))
    torch.testing.assert_close(fed_MT.amax(1), torch.full((12,), 0.5))


def test_noise_follows_the_seed() -> None:
    runs = [run(BVLLM(noise=True), seed=seed).matrix() for seed in (0, 0, 1)]
    assert runs[0].equal(runs[1]) and not runs[0].equal(runs[2])
    quiet = [run(BVLLM(), seed=seed).matrix() for seed in (0, 1)]
    assert quiet[0].equal(quiet[1])


def test_restore_gives_every_patch_the_token_it_fed() -> None:
    reduction = run(BVLLM())
    y_1MD = torch.arange(48.0)[None, :, None]
    back_N = reduction.restore(y_1MD, fill=-1.0)[0, :, 0]
    assert back_N.long().equal(reduction.groups_BN[0]) and (back_N >= 0).all()
    assert reduction.sizes(torch.ones(1, 288)).sum() == 288


def test_a_long_video_needs_no_dense_matrix() -> None:
    """An hour at a frame a second; the dense matrix alone would have 830 million entries."""
    grid = Grid.video(3600, 20, 20)
    x_ND = torch.zeros(grid.num_tokens, 1)
    x_ND[:, 0] = torch.arange(grid.num_tokens) % 977
    tokens = Tokens.from_grid(x_ND, grid)
    score_T = torch.rand(3600, generator=torch.Generator().manual_seed(0))
    reduction = run(BVLLM(), score_T, keep=576, grid=grid, tokens=tokens)
    assert reduction.num_out == 576 and reduction.matrix_BMN is None
    held = sum(
        x.numel()
        for x in (reduction.assignment_BN, reduction.weight_BN, reduction.anchor_BM)
        if x is not None
    )
    assert held <= 3 * grid.num_tokens


def test_images_are_merged_plane_by_plane() -> None:
    for name in ("image", "any resolution"):
        grid = LAYOUTS[name]
        tokens, budget = item(grid), Budget(retain=0.3)
        reduction = BVLLM().projector(tokens, ProjectorContext(budget, grid=grid))
        assert reduction is not None and reduction.kind == "merge"
        plane_N = grid.positions()[:, 0]
        mixed = reduction.matrix()[0] > 0
        for row_N in mixed:
            assert len(plane_N[row_N].unique()) == 1


def test_evidence() -> None:
    seen = []
    book = Notebook("projector", (288,), seen.append, grid=GRID, patches=True)
    reduction = run(BVLLM(), notebook=book)
    notes = {note.name: note for note in seen}
    assert set(notes) == {"relevance", "selector", "rows", "merged patches"}
    selector_T = notes["selector"].value.view(24, 12)[:, 0]
    row_T = notes["rows"].value.view(24, 12)[:, 0]
    assert float(selector_T.max()) <= 1 and row_T.unique().tolist() == list(
        range(int(row_T.max()) + 1)
    )
    assert reduction.num_out == 48


def test_bad_arguments() -> None:
    for wrong, match in (
        ({"queries": 0}, "queries must be at least 1"),
        ({"tau": 0.0}, "tau must be above 0"),
        ({"threshold": 1.5}, "threshold must lie in"),
        ({"compare": "some"}, "compare must be 'neighbours' or 'all'"),
        ({"chains": "keep"}, "chains must be 'follow' or 'drop'"),
        ({"order": "time"}, "order must be 'raster' or 'released'"),
    ):
        with pytest.raises(ValueError, match=match):
            BVLLM(**wrong)
    with pytest.raises(ValueError, match="make 1 to 3 stretches, got 4"):
        row_windows(torch.ones(3), 4)
    mixed = Grid((*Grid.video(2, 2, 2).planes, *Grid.video(1, 3, 3).planes), "video")
    with pytest.raises(ValueError, match="frames of one size"):
        run(BVLLM(), torch.ones(3), keep=4, grid=mixed)
