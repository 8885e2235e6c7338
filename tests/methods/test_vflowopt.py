"""VFlowOpt: what ranks tokens, what is averaged, and what the budget leaves to every layer."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from foveate import ops
from foveate.core import (
    Budget,
    DecoderContext,
    EncoderAttentionView,
    Grid,
    Plane,
    ProjectorContext,
    TokenKind,
    Tokens,
)
from foveate.errors import MissingSignalError
from foveate.methods.vflowopt import (
    PRESETS,
    VFlowOpt,
    attention_relevance,
    entropy_of,
    patch_entropy,
    plane_softmax,
    recycle,
)

from .helpers import LAYOUTS, context_for, item, reduce_item

ANY_RES = Grid((Plane(27, 27), Plane(20, 20, row_newline=True)))
#: Published shares: r_v, r_1, r_2 and what they come to in layers of 28.
PUBLISHED = {
    0.5: (0.72332, 0.74875, 0.487, 14.02),
    0.25: (0.26510, 0.98334, 0.87733, 7.02),
    0.1: (0.11662, 1.0, 0.6011, 2.80),
}


def importance_of(grid: Grid, seed: int = 0) -> torch.Tensor:
    value_N = torch.rand(grid.num_tokens, generator=torch.Generator().manual_seed(seed))
    return value_N.masked_fill(grid.kinds() != TokenKind.PATCH, 1.0)


def decoder_context(importance_N: torch.Tensor, layer: int, retain: float, num_layers: int = 28):
    carried = {"importance": importance_N}
    return DecoderContext(
        Budget(retain=retain), layer=layer, num_layers=num_layers, carried=carried.__getitem__
    )


# -- importance -----------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, 1.0, 1.5, 1e9])
def test_relevance_is_the_mean_row_of_what_is_important(threshold: float) -> None:
    q_IHPd, k_IHPd = torch.randn(2, 3, 4, 20, 5, generator=torch.Generator().manual_seed(0))
    ours_IP = attention_relevance(EncoderAttentionView(q_IHPd, k_IHPd), threshold)
    attention_IPP = (q_IHPd @ k_IHPd.transpose(-1, -2) / 5**0.5).softmax(-1).mean(1)
    for ours_P, attention_PP in zip(ours_IP, attention_IPP, strict=True):
        received_P = attention_PP.mean(0)
        rows = (received_P > threshold * received_P.mean()).nonzero()[:, 0]
        # None above the threshold: all of them.
        expected_P = attention_PP[rows].mean(0) if len(rows) else received_P
        torch.testing.assert_close(ours_P, expected_P)


def test_entropy_counts_grey_levels() -> None:
    picture_T3hw = torch.zeros(1, 3, 8, 12, dtype=torch.uint8)
    picture_T3hw[..., 4:8] = torch.tensor([0, 255], dtype=torch.uint8).repeat(2)
    generator = torch.Generator().manual_seed(0)
    picture_T3hw[..., 8:] = torch.randint(0, 256, (1, 3, 8, 4), generator=generator).byte()
    bits_TL = patch_entropy(picture_T3hw, 1, 3)
    grey = picture_T3hw[0, :, :, 8:].float().mean(0).round()
    share = grey.unique(return_counts=True)[1] / grey.numel()
    expected = [0.0, 1.0, float(-(share * share.log2()).sum())]
    torch.testing.assert_close(bits_TL[0], torch.tensor(expected))
    # Levels may be renamed: a stretched picture without rounding has the same entropy.
    dark_T3hw = torch.tensor([10, 20]).repeat(1, 3, 4, 4)
    assert patch_entropy(dark_T3hw, 2, 2).tolist() == [[1.0] * 4]


def test_cells_of_a_picture_that_does_not_divide() -> None:
    picture_T3hw = torch.zeros(2, 3, 10, 10, dtype=torch.uint8)
    picture_T3hw[1, :, :, 7:] = 255
    bits_TL = patch_entropy(picture_T3hw, 3, 3).view(2, 3, 3)
    assert (bits_TL[0] == 0).all() and (bits_TL[1, :, :2] == 0).all()
    # 10 columns in 3 cells: 0-3, 4-6, 7-9.
    assert (bits_TL[1, :, 2] == 0).all()


def test_entropy_has_a_mean_weight_of_one_in_every_plane() -> None:
    picture_T3hw = torch.randint(0, 256, (2, 3, 40, 42)).byte()
    picture_T3hw[0, :, :, 21:] = 7
    grid = Grid((Plane(3, 4), Plane(5, 6, row_newline=True)))
    entropy_N = entropy_of(picture_T3hw, grid)
    weight_N = plane_softmax(entropy_N, grid)
    assert weight_N.isnan().equal(grid.kinds() != TokenKind.PATCH)
    patch_P = grid.patch_index()
    for index_L in patch_P.split([12, 30]):
        torch.testing.assert_close(weight_N[index_L], entropy_N[index_L].softmax(0) * len(index_L))
    assert weight_N[0] > weight_N[3]


@pytest.mark.parametrize("alpha", [-0.8, 0.8])
def test_alpha_adds_the_entropy(alpha: float) -> None:
    grid = Grid.image(6, 8)
    picture_T3hw = torch.zeros(1, 3, 60, 80, dtype=torch.uint8)
    picture_T3hw[..., 20:30, 40:50] = torch.randint(0, 256, (10, 10)).byte()
    context = context_for(grid, Budget(retain=0.2))
    found = context.read
    context.read = lambda name: picture_T3hw if name == "encoder.pixels" else found(name)
    method, plain = VFlowOpt(alpha=alpha), VFlowOpt()
    setting = method.setting(0.2)
    gain_N = method.importance(context, setting) - plain.importance(context, plain.setting(0.2))
    assert int((gain_N * alpha).argmax()) == 2 * 8 + 4
    torch.testing.assert_close(gain_N.sum(), torch.tensor(alpha))
    assert method.needs == ("encoder.pixels",) and plain.needs == ()
    with pytest.raises(MissingSignalError, match=r"encoder\.pixels"):
        method.importance(context_for(grid, Budget(retain=0.2)), setting)


# -- prune and recycle ----------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.11662, 0.2651, 0.72332])
@pytest.mark.parametrize("cell", [3.0, 6.0, 17.387])
def test_recycled_tokens_are_convex_combinations_of_their_cells(keep: float, cell: float) -> None:
    importance_N = importance_of(ANY_RES)
    reduction = recycle(importance_N, ANY_RES, keep, cell)
    N = ANY_RES.num_tokens
    matrix_MN = reduction.matrix()[0]
    torch.testing.assert_close(matrix_MN.sum(1), torch.ones(len(matrix_MN)))
    assert (matrix_MN >= 0).all()
    low = min(round(N * (1 - keep)) + int(N / cell**2), ANY_RES.num_patches)
    groups = (matrix_MN > 0).sum(1)
    alone = int((groups == 1).sum())
    # Every source goes somewhere: low ones into averages, the others stay as they are.
    assert int((matrix_MN > 0).sum()) == N
    kept_M = reduction.anchor_BM[0]
    assert kept_M.tolist() == sorted(set(kept_M.tolist()))
    assert set((ANY_RES.kinds() == TokenKind.NEWLINE).nonzero()[:, 0].tolist()) <= set(
        kept_M.tolist()
    )
    high = importance_N.argsort(descending=True)[: N - low]
    assert set(high.tolist()) <= set(kept_M.tolist()) and alone >= len(high)
    position_N3 = ANY_RES.positions()
    for row_N, anchor in zip(matrix_MN, kept_M, strict=True):
        members = row_N.nonzero()[:, 0]
        assert int(importance_N[members].argmax()) == members.tolist().index(int(anchor))
        time, y, x = position_N3[members].double().unbind(1)
        assert len(set(time.tolist())) == 1
        assert len(set(((y / cell).floor() * 1000 + (x / cell).floor()).tolist())) == 1
        share_K = importance_N[members] / importance_N[members].sum()
        torch.testing.assert_close(row_N[members], share_K)
    cells = sum(math.ceil(p.height / cell) * math.ceil(p.width / cell) for p in ANY_RES.planes)
    # As many averages as cells, of which those at the edges are not whole.
    assert N - low < len(kept_M) <= N - low + cells


def test_keeping_all_without_extra_cells_is_the_identity() -> None:
    x_1ND = torch.randn(1, ANY_RES.num_tokens, 4)
    reduction = recycle(importance_of(ANY_RES), ANY_RES, 1.0, 100.0)
    assert reduction.apply(x_1ND).equal(x_1ND)


def test_importance_below_zero_weighs_nothing() -> None:
    importance_N = torch.tensor([5.0, -1.0, 1.0, 8.0, -2.0, -3.0, -4.0, 6.0])
    # Cells of four columns: 1 and 2 share one, 4, 5 and 6 the other.
    matrix_MN = recycle(importance_N, Grid.image(1, 8), 3 / 8, 4.0).matrix()[0]
    assert matrix_MN[1].tolist() == [0, 0, 1, 0, 0, 0, 0, 0]
    third = pytest.approx(1 / 3)
    assert matrix_MN[3].tolist() == [0, 0, 0, 0, third, third, third, 0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("retain", [0.05, 0.1, 0.25, 0.5])
def test_counts(layout: str, retain: float) -> None:
    grid, budget = LAYOUTS[layout], Budget(retain=retain)
    reduction = reduce_item(VFlowOpt(cell=3.0), grid, budget)
    counted = VFlowOpt(cell=3.0).count(grid, budget)
    assert reduction.num_out <= counted.tokens
    assert counted.exact == (grid.modality == "video")
    assert reduction.num_out == counted.tokens or not counted.exact
    special = (grid.kinds() != TokenKind.PATCH).nonzero()[:, 0].tolist()
    kept = set(reduction.anchor_BM[0].tolist())
    assert set(special) < kept


def test_videos_and_several_images_keep_the_best() -> None:
    budget, image = Budget(retain=0.25), LAYOUTS["any resolution"]
    for grid, grids in ((LAYOUTS["video, newline at end"], ()), (image, (image, image))):
        context = context_for(grid, budget)
        context.grids = grids
        reduction = VFlowOpt().projector(item(grid), context)
        assert reduction is not None and reduction.kind == "select"
        keep = round(grid.num_tokens * VFlowOpt().setting(0.25).keep_input)
        expected = ops.top_k(context.carried["importance"], keep)
        assert reduction.anchor_BM[0].tolist() == expected.tolist()


# -- budget ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("retain", PUBLISHED)
def test_published_shares_come_to_the_published_budget(retain: float) -> None:
    r_v, r_1, r_2, layers = PUBLISHED[retain]
    assert 9 * r_v + 9 * r_v * r_1 + 10 * r_v * r_1 * r_2 == pytest.approx(layers, abs=0.005)
    setting = VFlowOpt().setting(retain)
    assert setting == PRESETS[retain]
    assert (setting.keep_input, setting.keep_first) == (r_v, r_1)
    cuts, kept = VFlowOpt().schedule(retain, 28)
    assert cuts == (9, 18) and kept == (r_1, pytest.approx(r_2, abs=0.01))


@pytest.mark.parametrize("num_layers", [2, 3, 4, 5, 24, 28, 32, 80])
@pytest.mark.parametrize("retain", [0.01, 0.05, 0.1, 0.2, 0.25, 0.4, 0.5, 0.75, 0.95])
def test_the_mean_over_all_layers_is_the_budget(num_layers: int, retain: float) -> None:
    method = VFlowOpt()
    cuts, kept = method.schedule(retain, num_layers)
    assert len(cuts) == min(2, num_layers - 1)
    assert all(0 < share <= 1 for share in kept)
    present, total = method.setting(retain).keep_input, 0.0
    assert 0 < present <= 1
    for (first, last), share in zip(pairwise((0, *cuts, num_layers)), (1.0, *kept), strict=True):
        present *= share
        total += (last - first) * present
    assert total / num_layers == pytest.approx(retain, rel=1e-6)


def test_a_setting_of_ones_own_cannot_exceed_the_budget() -> None:
    for keep_input, keep_first in ((0.3, 1.0), (0.375, 1.0), (0.6, 1.0), (0.1, 0.5)):
        method = VFlowOpt(keep_input=keep_input, keep_first=keep_first)
        _, (first, second) = method.schedule(0.25, 28)
        mean = keep_input * (9 + 9 * first + 10 * first * second) / 28
        assert mean <= 0.25 + 1e-9
        assert mean == pytest.approx(0.25) or second == 1
    assert method.schedule(0.25, 28)[1] == (0.5, 1.0)


def test_tokens_stand_for_the_mean_share() -> None:
    grid = LAYOUTS["image"]
    by_share = reduce_item(VFlowOpt(), grid, Budget(retain=0.25))
    by_count = reduce_item(VFlowOpt(), grid, Budget(tokens=12))
    assert by_share.anchor_BM.equal(by_count.anchor_BM)


def test_settings_between_the_published_budgets() -> None:
    settings = [VFlowOpt().setting(share / 100) for share in range(1, 100)]
    shares = [setting.keep_input for setting in settings]
    assert shares == sorted(shares)
    assert {setting.cell for setting in settings} == {s.cell for s in PRESETS.values()}
    assert VFlowOpt().setting(0.05).keep_input == pytest.approx(0.11662 / 2)
    own = VFlowOpt(threshold=2.0, alpha=0.1, cell=5.0, keep_input=0.3, keep_first=0.9)
    assert list(vars(own.setting(0.2)).values()) == [2.0, 0.1, 5.0, 0.3, 0.9]


# -- decoder --------------------------------------------------------------------------------------


@pytest.mark.parametrize("retain", [0.1, 0.25, 0.5])
def test_later_cuts_are_nested(retain: float) -> None:
    importance_N, method = importance_of(ANY_RES), VFlowOpt()
    _, kept = method.schedule(retain, 28)
    index_N = torch.arange(ANY_RES.num_tokens)
    for layer, share in zip((9, 18), kept, strict=True):
        N = len(index_N)
        tokens = Tokens(torch.zeros(1, N, 2))
        context = decoder_context(importance_N[index_N], layer, retain)
        reduction = method.decoder(tokens, context)
        keep = N - round(N * (1 - share))
        if keep == N:
            assert reduction is None
            continue
        assert reduction is not None and reduction.num_out == keep
        left_M = reduction.anchor_BM[0]
        gone_K = torch.tensor(sorted(set(range(N)) - set(left_M.tolist())))
        assert importance_N[index_N][left_M].min() >= importance_N[index_N][gone_K].max()
        index_N = index_N[left_M]


def test_one_token_stays_where_the_budget_leaves_none() -> None:
    method = VFlowOpt(keep_input=0.9)
    reduction = method.decoder(
        Tokens(torch.zeros(1, 50, 2)), decoder_context(torch.arange(50.0), 18, 0.1)
    )
    assert reduction is not None and reduction.anchor_BM.tolist() == [[49]]


@pytest.mark.parametrize("place", [0, 300, 728])
def test_the_needle_that_important_tokens_look_at_survives_to_layer_27(place: int) -> None:
    """Three hubs receive much attention, and the needle only theirs."""
    grid, P, hubs = Grid.image(27, 27), 729, [10, 400, 600]
    attention_PP = torch.rand(P, P, generator=torch.Generator().manual_seed(0)) + 0.5
    attention_PP[:, hubs] = 600.0
    attention_PP[:, place] = 1e-6
    attention_PP[hubs, place] = 300.0
    attention_PP /= attention_PP.sum(1, keepdim=True)
    received_P = attention_PP.mean(0)
    view = EncoderAttentionView(
        torch.eye(P)[None, None] * math.sqrt(P), attention_PP.log().T[None, None]
    )
    context = ProjectorContext(
        Budget(retain=0.1),
        grid=grid,
        encoder_layers=(25,),
        read_encoder=lambda layer: view,
    )
    method = VFlowOpt()
    setting = method.setting(0.1)
    important = (received_P > setting.threshold * received_P.mean()).nonzero()[:, 0].tolist()
    assert important == hubs
    tokens = Tokens.from_grid(torch.randn(P, 4), grid)
    reduction = method.projector(tokens, context)
    assert reduction is not None
    index_N = reduction.anchor_BM[0]
    # By the attention that it receives from all others it would be the first to go.
    others = [i for i in range(P) if i not in hubs]
    assert int(attention_PP[others].mean(0).argmin()) == place
    for layer in (9, 18):
        left = method.decoder(
            Tokens(torch.zeros(1, len(index_N), 2)),
            decoder_context(context.carried["importance"][index_N], layer, 0.1),
        )
        if left is not None:
            index_N = index_N[left.anchor_BM[0]]
    assert place in index_N.tolist() and len(index_N) < 0.08 * P


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": -1.0}, "threshold"),
        ({"alpha": math.nan}, "alpha"),
        ({"cell": 0.5}, "cell"),
        ({"keep_input": 0.0}, "keep_input"),
        ({"keep_first": 1.5}, "keep_first"),
        ({"layers": (3,)}, "two layers"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VFlowOpt(**arguments)


def test_layers_of_ones_own() -> None:
    assert VFlowOpt(layers=(2, 0.5)).cuts(12) == (2, 6)
    for wrong in ((0, 4), (4, 4), (6, 3), (3, 12)):
        with pytest.raises(ValueError, match="layers"):
            VFlowOpt(layers=wrong).check(None, 12)


def test_the_search_box_of_the_paper() -> None:
    space = VFlowOpt().search_space(0.25)
    box = {name: (found.low, found.high) for name, found in space.items()}
    assert box.pop("keep_first") == (pytest.approx(0.533, abs=1e-3), 1.0)
    assert box == {
        "threshold": (0, 50),
        "alpha": (-1, 1),
        "cell": (3, 24),
        "keep_input": (0.25, 0.375),
    }
    for name, (low, high) in box.items():
        VFlowOpt(**{name: low}), VFlowOpt(**{name: high})
