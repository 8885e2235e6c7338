"""HoliTom: invariants of its card and planted needles."""

from __future__ import annotations

import pytest
import torch

from foveate.core import Budget, Grid, Plane, TokenKind, Tokens
from foveate.methods.holitom import HoliTom, inner, outer

from .helpers import LAYOUTS, context_for, decoder_context, item, reduce_item, view_of


def video(frames: int, places: int, channels: int = 12, seed: int = 0) -> torch.Tensor:
    """A video without motion, [T, N, C]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(places, channels, generator=generator).expand(frames, -1, -1).clone()


def noise(*shape: int, seed: int = 9) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_identical_frames_are_one_segment() -> None:
    feat_TNC = video(6, 10)
    found = outer(feat_TNC, torch.rand(6, 10), 0.1)
    assert found.segmentation.bounds.tolist() == [[0, 5]]
    assert found.segmentation.removed == 50
    assert found.effective_retain == pytest.approx(0.6)
    assert bool(found.static_TN.all())
    assert outer(feat_TNC, torch.rand(6, 10), 0.5).effective_retain == 1.0


def test_a_threshold_of_one_cuts_every_frame() -> None:
    found = outer(video(5, 8), torch.rand(5, 8), 0.25, tau=1.0)
    assert found.segmentation.bounds.tolist() == [[t, t] for t in range(5)]
    assert found.effective_retain == 0.25
    assert not found.static_TN.any()


def test_keeping_all_of_a_video_without_redundancy_is_the_identity() -> None:
    found = outer(noise(4, 9, 12), torch.rand(4, 9), 1.0)
    assert found.target_TN.flatten().tolist() == list(range(36))
    assert bool((found.weight_TN == 1).all())


def test_scene_changes_are_cut() -> None:
    feat_TNC = torch.cat([video(4, 12, seed=1), video(3, 12, seed=2), video(5, 12, seed=3)])
    found = outer(feat_TNC, torch.rand(12, 12), 0.2)
    assert found.segmentation.bounds.tolist() == [[0, 3], [4, 6], [7, 11]]


def test_a_patch_that_differs_in_one_frame_survives_unchanged() -> None:
    grid = Grid.video(8, 4, 5, newlines_at_end=1)
    feat_TNC = video(8, 20)
    needle = noise(12)
    feat_TNC[5, 13] = needle
    x_ND = torch.cat([feat_TNC.flatten(0, 1), noise(1, 12, seed=4)])
    scores_N = torch.full((161,), 0.01)
    scores_N[5 * 20 + 13] = 1.0
    tokens = Tokens.from_grid(x_ND, grid)
    reduction = reduce_item(HoliTom(), grid, Budget(retain=0.15), tokens, scores_N=scores_N)
    out_MC = reduction.apply(tokens.x_BND)[0]
    assert bool((out_MC == needle).all(1).any())
    assert 5 * 20 + 13 in reduction.anchor_BM[0].tolist()


@pytest.mark.parametrize("name", [name for name, g in LAYOUTS.items() if g.modality == "video"])
def test_dynamic_tokens_are_bit_equal_and_static_ones_averages(name: str) -> None:
    grid = LAYOUTS[name]
    tokens = item(grid)
    context = context_for(grid, Budget(retain=0.3))
    reduction = HoliTom(tau=0.7).projector(tokens, context)
    assert reduction is not None
    static_TN = context.state["static"]
    segments = context.state["segments"]
    assert [first for first, _ in segments] == [0, *(last + 1 for _, last in segments[:-1])]
    assert segments[-1][1] == len(grid.planes) - 1
    static_N = torch.zeros(grid.num_tokens, dtype=torch.bool)
    static_N[grid.patch_index()] = static_TN.flatten()
    out_MD, sources = reduction.apply(tokens.x_BND)[0], (reduction.matrix()[0] > 0).sum(1)
    for m, anchor in enumerate(reduction.anchor_BM[0].tolist()):
        if not static_N[anchor]:
            assert sources[m] == 1 and out_MD[m].equal(tokens.x_BND[0, anchor])
        else:
            first, last = next(s for s in segments if s[0] <= grid.positions()[anchor, 0] <= s[1])
            assert grid.positions()[anchor, 0] == first and sources[m] % (last - first + 1) == 0


def test_order_of_the_two_newline_modes() -> None:
    rows = Grid((Plane(4, 5, row_newline=True),) * 6, "video")
    tokens = item(rows)
    raster = reduce_item(HoliTom(), rows, Budget(retain=0.3), tokens)
    anchors = raster.anchor_BM[0]
    assert anchors.tolist() == sorted(anchors.tolist())
    kinds_M = rows.kinds()[anchors]
    occupied = {tuple(p) for p in rows.positions()[anchors[kinds_M == 0], :2].tolist()}
    newlines = [tuple(p) for p in rows.positions()[anchors[kinds_M == 1], :2].tolist()]
    assert set(newlines) == occupied and len(newlines) == len(occupied)
    single = reduce_item(HoliTom(newline="one_token"), rows, Budget(retain=0.3), tokens)
    assert set(rows.kinds()[single.anchor_BM[0]].tolist()) == {int(TokenKind.PATCH)}


def test_special_tokens_of_the_prompt_stay() -> None:
    grid = LAYOUTS["video, [CLS] per frame"]
    reduction = reduce_item(HoliTom(), grid, Budget(retain=0.2))
    kinds_M = grid.kinds()[reduction.anchor_BM[0]]
    assert (kinds_M == TokenKind.CLS).sum() == 6
    assert kinds_M[-1] == TokenKind.NEWLINE
    frames_M = grid.positions()[reduction.anchor_BM[0], 0].tolist()
    assert frames_M == sorted(frames_M)


def test_threshold_follows_the_published_table() -> None:
    # Neighbours with a cosine of about 0.7 are redundant at tau 0.65 and not at 0.80.
    grid = Grid.video(2, 4, 4)
    base = noise(16, 64)
    other = noise(16, 64, seed=5)
    base, other = (x / x.norm(dim=1, keepdim=True) for x in (base, other))
    other = other - (other * base).sum(1, keepdim=True) * base
    other = 0.7 * base + (1 - 0.49) ** 0.5 * other / other.norm(dim=1, keepdim=True)
    tokens = Tokens.from_grid(torch.cat([base, other]), grid)
    for retain, segments in ((0.10, [(0, 1)]), (0.15, [(0, 0), (1, 1)])):
        context = context_for(grid, Budget(retain=retain))
        HoliTom().projector(tokens, context)
        assert context.state["segments"] == segments


def test_frames_of_unequal_size_are_refused() -> None:
    grid = Grid((Plane(4, 4), Plane(2, 2)), "video")
    with pytest.raises(ValueError, match=r"frames of one size.*\(2, 2\), \(4, 4\)"):
        HoliTom().projector(item(grid), context_for(grid, Budget(retain=0.3)))


def test_cls_scores_on_request() -> None:
    assert HoliTom().needs == ("encoder.received_attention",)
    assert HoliTom(scores="cls").needs == ("encoder.cls_attention",)
    assert HoliTom().needs == ("encoder.received_attention",)


@pytest.mark.parametrize(
    "arguments",
    [
        {"tau": 2.0},
        {"beta": 1.5},
        {"neighbours": 0},
        {"max_window": 0},
        {"inner_retain": 0.0},
        {"inner_layer": 0},
        {"newline": "rows"},
        {"inner_merge": "max"},
        {"static_output": "first"},
        {"scores": "mean"},
    ],
)
def test_bad_arguments(arguments: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        HoliTom(**arguments)


# -- inside the language model ----------------------------------------------------------------


def test_inner_layers() -> None:
    assert HoliTom().decoder_layers(28) == (18,) and HoliTom().attention_layers(28) == (17,)
    assert HoliTom(inner_layer=60).decoder_layers(80) == (60,)
    assert HoliTom().decoder_layers(2) == (1,)
    assert HoliTom().decoder_layers(1) == ()
    assert HoliTom(inner_retain=1).decoder_layers(28) == ()
    with pytest.raises(ValueError, match="inner_layer = 30 does not exist"):
        HoliTom(inner_layer=30).check(None, 28)


def test_inner_merge_by_hand() -> None:
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [4.0, 0.0]])
    score = torch.tensor([0.9, 0.8, 0.1, 0.2])
    folded = inner(hidden, score, 0.5)
    assert folded.anchor_BM.tolist() == [[0, 1]]
    # Tokens 2 and 4 fold into 1, in this order: ((1 + 2) / 2 + 4) / 2.
    assert folded.apply(hidden[None])[0].tolist() == [[2.75, 0.0], [0.0, 1.0]]
    averaged = inner(hidden, score, 0.5, merge="mean").apply(hidden[None])[0]
    torch.testing.assert_close(averaged, torch.tensor([[7 / 3, 0.0], [0.0, 1.0]]))


def test_inner_keeps_everything_at_retain_one() -> None:
    hidden = noise(7, 5)
    kept = inner(hidden, torch.rand(7), 1.0)
    assert kept.apply(hidden[None])[0].equal(hidden) and kept.num_out == 7


def test_inner_reads_the_attention_through_what_was_dropped() -> None:
    # The layer before saw 10 tokens; 3 and 5 are gone now. Visual tokens were 2 .. 7.
    row_S = torch.tensor([9.0, 9.0, 5.0, 9.0, 1.0, 9.0, 4.0, 2.0, 9.0, 9.0])
    survivors = torch.tensor([0, 1, 2, 4, 6, 7, 8, 9])
    view = view_of(row_S, torch.arange(2, 8))
    context = decoder_context(
        view, 5, visual_N=torch.tensor([2, 3, 4, 5]), survivors=lambda layer: survivors
    )
    reduction = HoliTom(inner_layer=5).decoder(Tokens(noise(1, 4, 6)), context)
    assert reduction is not None
    assert reduction.anchor_BM.tolist() == [[0, 2]]  # scores 5, 1, 4, 2


def test_images_are_left_alone() -> None:
    grid = LAYOUTS["image"]
    before = context_for(grid, Budget(retain=0.3))
    assert HoliTom().projector(item(grid), before) is None and not before.state
    view = view_of(torch.rand(10), torch.arange(2, 8))
    method, tokens = HoliTom(inner_layer=5), Tokens(noise(1, 6, 4))
    for modalities, acts in (({"image"}, False), ({"image", "video"}, True), (set(), True)):
        context = decoder_context(view, 5, modalities=frozenset(modalities))
        assert (method.decoder(tokens, context) is not None) is acts
