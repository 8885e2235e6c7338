"""FastV and AIM inside the language model, AIM's merging before it, QuickVideo at the cache."""

from __future__ import annotations

import pytest
import torch

from foveate.core import AttentionView, Budget, CacheContext, Grid, Plane, TokenKind, Tokens
from foveate.methods.aim import AIM, merge_planes, merge_rounds
from foveate.methods.fastv import FastV
from foveate.methods.quickvideo import QuickVideo, prune_keys

from .helpers import LAYOUTS, context_for, decoder_context, item, reduce_item, view_of


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- FastV ------------------------------------------------------------------------------------


def test_fastv_keeps_what_the_last_token_attends_to() -> None:
    row_S = torch.tensor([9.0, 0.1, 0.5, 0.2, 0.4, 0.3, 9.0])
    view = view_of(row_S, torch.arange(1, 6))
    reduction = FastV().decoder(Tokens(normal(1, 5, 4)), decoder_context(view, 2))
    assert reduction is not None
    assert reduction.anchor_BM.tolist() == [[1, 3]]  # round(2.5) is 2, half to even
    context = decoder_context(view, 2, Budget(tokens=3))
    reduction = FastV().decoder(Tokens(normal(1, 5, 4)), context)
    assert reduction is not None and reduction.anchor_BM.tolist() == [[1, 3, 4]]


def test_fastv_averages_over_heads() -> None:
    # Head 0 prefers token 1, head 1 strongly token 3.
    keys = torch.tensor([[0.0, 1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 5.0, 0.0]])
    view = AttentionView(torch.ones(1, 2, 5, 1), keys[None, :, :, None], 1.0, torch.arange(1, 4))
    context = decoder_context(view, 2, Budget(tokens=1))
    reduction = FastV().decoder(Tokens(normal(1, 3, 4)), context)
    assert reduction is not None and reduction.anchor_BM.tolist() == [[2]]


def test_fastv_reads_the_attention_through_what_was_dropped() -> None:
    view = view_of(torch.tensor([9.0, 5.0, 1.0, 2.0, 9.0]), torch.arange(1, 4))
    context = decoder_context(
        view,
        2,
        visual_N=torch.tensor([1, 2]),
        survivors=lambda layer: torch.tensor([0, 2, 3, 4]),
    )
    reduction = FastV().decoder(Tokens(normal(1, 2, 4)), context)
    assert reduction is not None and reduction.anchor_BM.tolist() == [[1]]


def test_fastv_layers() -> None:
    assert FastV(layer=0.5).decoder_layers(8) == (4,)
    assert FastV().decoder_layers(1) == ()
    with pytest.raises(ValueError, match="layer = 9 does not exist"):
        FastV(layer=9).check(None, 8)
    with pytest.raises(ValueError, match="at least 1"):
        FastV(layer=0)


@pytest.mark.parametrize("method", [FastV(), AIM()], ids=["fastv", "aim"])
def test_nothing_happens_at_a_full_budget_or_without_visual_tokens(method) -> None:
    view = view_of(torch.rand(6), torch.arange(1, 4))
    full = decoder_context(view, 6, Budget(retain=1.0))
    assert method.decoder(Tokens(normal(1, 3, 4)), full) is None
    empty = decoder_context(view, 6, visual_N=torch.arange(0))
    assert method.decoder(Tokens(normal(1, 0, 4)), empty) is None


# -- AIM --------------------------------------------------------------------------------------


def test_aim_schedule_follows_the_depth() -> None:
    assert AIM().kept_after(56)[28:44:2] == [
        1 - 0.0625 * k for k in range(1, 16, 2)
    ]  # half the step, every layer
    assert AIM().decoder_layers(4) == (3,)
    assert AIM(first_layer=13, step=0.125 * 32 / 28).kept_after(32)[12:15] == [1.0, 0.875, 0.75]
    explicit = AIM(schedule=(1.0, 0.5, 0.5, 0.0))
    assert explicit.decoder_layers(4) == (2,)
    assert explicit.attention_layers(4) == (1,)


def test_aim_drops_by_the_formula_down_to_none_and_the_needle_goes_last() -> None:
    num_visual, num_layers, needle = 20, 28, 13
    alive, counts, seen = torch.arange(3, 3 + num_visual), [], []
    for layer in AIM().decoder_layers(num_layers):
        S = 3 + len(alive) + 4
        keys = torch.zeros(1, 1, S, 1)
        keys[0, 0, 3 + (alive == 3 + needle).nonzero()[:, 0]] = 3.0
        visual_N = torch.arange(3, 3 + len(alive))
        view = AttentionView(torch.ones(1, 1, S, 1), keys, 1.0, visual_N)
        context = decoder_context(view, layer, num_layers=num_layers, num_visual=num_visual)
        reduction = AIM().decoder(Tokens(normal(1, len(alive), 4)), context)
        assert reduction is not None and reduction.kind == "select"
        kept = reduction.anchor_BM[0]
        assert kept.tolist() == sorted(kept.tolist())
        alive = alive[kept]
        counts.append(len(alive))
        seen.append(3 + needle in alive.tolist())
    assert counts == [17, 15, 12, 10, 7, 5, 2, 0]
    assert seen == [True] * 7 + [False]


def test_aim_rounds_reach_every_count() -> None:
    for tokens in (1, 2, 7, 49, 196):
        for keep in range(1, tokens + 1):
            rounds = merge_rounds(tokens, keep)
            assert tokens - sum(rounds) == keep
            left = tokens
            for r in rounds:
                assert 0 < r <= left // 2
                left -= r


def test_aim_merging_keeps_equal_tokens_and_never_mixes_frames() -> None:
    x_PLC = normal(3, 1, 6).expand(3, 16, 6).clone()
    merged = merge_planes(x_PLC, 5)
    torch.testing.assert_close(merged.apply(x_PLC), x_PLC[:, :5])
    # A full round of an even number leaves the odd places, in order.
    assert merge_planes(normal(1, 8, 6), 4).anchor_BM.tolist() == [[1, 3, 5, 7]]


def test_aim_averages_do_not_weigh_sizes() -> None:
    x_PLC = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [1.0, 0.0], [1.0, 0.1]]])
    first = merge_planes(x_PLC, 2)  # sources 0 and 2 both go to place 1, the first of the best
    assert first.groups_BN.tolist() == [[0, 0, 0, 1]]
    second = merge_planes(x_PLC, 1)
    weights_N = second.matrix()[0, 0]
    torch.testing.assert_close(weights_N, torch.tensor([1 / 6, 1 / 6, 1 / 6, 1 / 2]))


def test_aim_leaves_newlines_alone() -> None:
    end = LAYOUTS["any resolution"]
    anchors = reduce_item(AIM(), end, Budget(retain=0.3)).anchor_BM[0]
    assert anchors.tolist() == sorted(anchors.tolist())
    plain = Grid((Plane(5, 5), Plane(5, 5)), "video", newlines_at_end=1)
    anchors = reduce_item(AIM(), plain, Budget(tokens=40)).anchor_BM[0]
    assert plain.kinds()[anchors[-1]] == TokenKind.NEWLINE
    # A partial round puts unmerged sources first, frame by frame.
    assert anchors[:20].max() < 25 <= anchors[20:].min()
    assert anchors[8:20].tolist() == list(range(1, 25, 2))


@pytest.mark.parametrize(
    "arguments",
    [
        {"first_layer": -1},
        {"step": 0.0},
        {"schedule": (0.5, 0.7)},
        {"temperature": 0.0},
        {"iterations": -1},
        {"damping": 1.5},
    ],
)
def test_aim_bad_arguments(arguments: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        AIM(**arguments)


def test_aim_schedule_must_fit_the_model() -> None:
    with pytest.raises(ValueError, match="schedule has 2 entries for 4"):
        AIM(schedule=(1.0, 0.5)).check(None, 4)
    with pytest.raises(ValueError, match="first_layer = 30"):
        AIM(first_layer=30).check(None, 28)


# -- QuickVideo -------------------------------------------------------------------------------


def cache_context(grid: Grid, budget: Budget, items: int = 1, **more) -> CacheContext:
    position_N3 = grid.positions().repeat(items, 1)
    item_N = torch.arange(items).repeat_interleave(grid.num_tokens)
    return CacheContext(
        budget, **{"num_layers": 4, "position_N3": position_N3, "item_N": item_N, **more}
    )


def test_quickvideo_keeps_a_share_of_every_group_of_every_item() -> None:
    grid = Grid.video(6, 2, 5)
    keys, values = normal(1, 2, 120, 4), normal(1, 2, 120, 4, seed=1)
    context = cache_context(grid, Budget(retain=0.35), items=2)
    reduction = QuickVideo(group_frames=4).cache(keys, values, context)
    assert reduction is not None
    kept = reduction.anchor_BM[0]
    assert kept.tolist() == sorted(kept.tolist())
    edges = torch.tensor([40, 60, 100, 120])
    groups = torch.bucketize(kept, edges, right=True)
    assert torch.bincount(groups).tolist() == [14, 7, 14, 7]
    norm_N = keys.norm(dim=(1, 3))[0]
    dropped = torch.ones(120, dtype=torch.bool).index_fill(0, kept, False)
    assert norm_N[:40][~dropped[:40]].max() < norm_N[:40][dropped[:40]].min()


def test_quickvideo_finds_the_frame_of_small_keys() -> None:
    grid = Grid.video(16, 2, 3)
    keys, values = normal(1, 2, 96, 4), normal(1, 2, 96, 4, seed=1)
    keys[:, :, 42:48] *= 0.01
    reduction = QuickVideo().cache(keys, values, cache_context(grid, Budget(retain=0.2)))
    assert reduction is not None and set(range(42, 48)) <= set(reduction.anchor_BM[0].tolist())
    values[:, :, 12:18] *= 100
    reduction = QuickVideo(score="value_norms").cache(
        keys, values, cache_context(grid, Budget(retain=0.2))
    )
    assert reduction is not None and set(range(12, 18)) <= set(reduction.anchor_BM[0].tolist())


def test_quickvideo_options() -> None:
    half = Budget(retain=0.5)
    assert QuickVideo(top_k=20).kept(96, half) == 20
    assert QuickVideo().kept(1, half) == 1  # too small a group stays whole
    linear = [QuickVideo(decay="linear").kept(96, half, layer, 4) for layer in range(4)]
    assert linear == [48, 36, 24, 12]
    falling = QuickVideo(decay="exponential", decay_factor=0.5)
    assert [falling.kept(96, half, layer, 8) for layer in (0, 1, 2, 7)] == [48, 24, 12, 1]
    grid = Grid.video(2, 2, 2)
    keys = normal(1, 1, 8, 4)
    late = QuickVideo(start_layer=0.5)
    assert late.cache(keys, keys, cache_context(grid, half, layer=1)) is None
    assert late.cache(keys, keys, cache_context(grid, half, layer=2)) is not None
    assert late.cache(keys, keys, cache_context(grid, Budget(retain=1.0), layer=2)) is None


def test_quickvideo_leaves_earlier_entries_bit_identical() -> None:
    keys, values = normal(1, 2, 30, 4), normal(1, 2, 30, 4, seed=1)
    keep, short_keys, short_values = prune_keys(keys, values, 10, retain=0.25)
    assert len(keep) == 5 and short_keys.shape == (1, 2, 15, 4)
    assert short_keys[:, :, :10].equal(keys[:, :, :10])
    assert short_values[:, :, 10:].equal(values[:, :, keep + 10])


@pytest.mark.parametrize(
    "arguments",
    [
        {"group_frames": 0},
        {"score": "max"},
        {"top_k": 0},
        {"decay": "cosine"},
        {"decay_factor": 0.0},
        {"start_layer": -1},
    ],
)
def test_quickvideo_bad_arguments(arguments: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        QuickVideo(**arguments)


def test_half_precision() -> None:
    keys = normal(1, 2, 96, 4).bfloat16()
    grid = Grid.video(16, 2, 3)
    reduction = QuickVideo().cache(keys, keys, cache_context(grid, Budget(retain=0.2)))
    assert reduction is not None and reduction.num_out == 19
    tokens = Tokens(item(LAYOUTS["video"]).x_BND.bfloat16())
    merged = AIM().projector(tokens, context_for(LAYOUTS["video"], Budget(retain=0.3)))
    assert merged is not None and bool(merged.apply(tokens.x_BND).isfinite().all())
