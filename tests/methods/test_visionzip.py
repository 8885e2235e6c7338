"""VisionZip: dominant and contextual tokens against their definition, splits and needles."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from foveate.core import Budget, Count, Grid, Plane, Reduction, TokenKind
from foveate.errors import MissingSignalError
from foveate.methods.visionzip import VisionZip, mean_keys, zip_planes

from .helpers import LAYOUTS, context_for, encoder_view, item, reduce_item


def draw(planes: int = 2, patches: int = 60, channels: int = 8):
    generator = torch.Generator().manual_seed(0)
    score_TL = torch.rand(planes, patches, generator=generator)
    return score_TL, torch.randn(planes, patches, channels, generator=generator)


def by_hand(score_L, x_LE, dominant: int, contextual: int, merge: str) -> torch.Tensor:
    """One plane, token by token."""
    best = sorted(sorted(range(len(score_L)), key=lambda i: -score_L[i])[:dominant])
    rest = [i for i in range(len(score_L)) if i not in best]
    step = max(1, len(rest) // contextual)
    targets = [rest[step * c] for c in range(contextual)]
    taken: dict[int, list[int]] = {target: [] for target in targets}
    for i in rest:
        if i not in targets:
            cosines = [torch.cosine_similarity(x_LE[i], x_LE[t], dim=0).item() for t in targets]
            taken[targets[cosines.index(max(cosines))]].append(i)
    merged = []
    for target, others in taken.items():
        if merge == "mean":
            merged.append(x_LE[[target, *others]].mean(0))
        else:
            merged.append(x_LE[target] + (x_LE[others].mean(0) if others else 0))
    return torch.stack([*(x_LE[i] for i in best), *merged])


@pytest.mark.parametrize("merge", ["mean", "add"])
@pytest.mark.parametrize(("dominant", "contextual"), [(10, 4), (1, 1), (20, 30), (54, 6)])
def test_definition(dominant: int, contextual: int, merge) -> None:
    score_TL, x_TLE = draw()
    reduction = zip_planes(score_TL, x_TLE, dominant, contextual, merge=merge)
    out_TME = reduction.apply(x_TLE)
    for score_L, x_LE, out_ME in zip(score_TL, x_TLE, out_TME, strict=True):
        expected = by_hand(score_L, x_LE, dominant, contextual, merge)
        torch.testing.assert_close(out_ME, expected, atol=1e-5, rtol=1e-5)


def test_published_splits() -> None:
    method, grid = VisionZip(), Grid.image(24, 24)
    assert [method.split(kept) for kept in (64, 128, 192)] == [(54, 10), (108, 20), (162, 30)]
    for kept in (64, 128, 192):
        assert method.count(grid, Budget(tokens=kept)) == Count(kept)
        assert reduce_item(method, grid, Budget(tokens=kept)).num_out == kept
    tiles = Grid((Plane(24, 24),) * 5)
    for total in (160, 320, 640):
        assert method.count(tiles, Budget(tokens=total)) == Count(total)
    assert method.count(Grid.video(8, 16, 16), Budget(tokens=136)) == Count(136)
    # The default budget is the published 64 of 576.
    assert method.count(grid, Budget(retain=method.card.retain)) == Count(64)


def test_every_patch_is_somewhere() -> None:
    grid = LAYOUTS["video"]
    reduction = reduce_item(VisionZip(), grid, Budget(retain=0.3))
    assert bool((reduction.groups_BN >= 0).all())
    none = reduce_item(VisionZip(contextual=0.0), grid, Budget(retain=0.3))
    assert (none.groups_BN >= 0).sum() == none.num_out == reduction.num_out


def test_the_needle_stays_itself() -> None:
    grid = LAYOUTS["video"]
    scores_N = torch.rand(grid.num_tokens, generator=torch.Generator().manual_seed(2))
    scores_N[3 * 35 + 20] = 2.0
    tokens = item(grid)
    reduction = reduce_item(VisionZip(), grid, Budget(retain=0.05), tokens, scores_N=scores_N)
    place = reduction.anchor_BM[0].tolist().index(3 * 35 + 20)
    assert reduction.apply(tokens.x_BND)[0, place].equal(tokens.x_BND[0, 3 * 35 + 20])


def test_like_patches_gather_in_one_contextual_token() -> None:
    x_1LE = torch.eye(4).repeat_interleave(6, 0)[None]
    score_1L = torch.zeros(1, 24)
    reduction = zip_planes(score_1L, x_1LE, 0, 4)
    torch.testing.assert_close(reduction.apply(x_1LE)[0], torch.eye(4))
    assert reduction.sizes(torch.ones(1, 24)).tolist() == [[6.0] * 4]


def test_contextual_tokens_follow_dominant_ones_unless_rows_end_in_newlines() -> None:
    grid = LAYOUTS["video, [CLS] per frame"]
    anchors_M = reduce_item(VisionZip(contextual=0.5), grid, Budget(retain=0.2)).anchor_BM[0]
    kinds, frames = grid.kinds()[anchors_M].tolist(), grid.positions()[anchors_M, 0].tolist()
    assert kinds == [TokenKind.CLS, *[TokenKind.PATCH] * 4] * 6 + [TokenKind.NEWLINE]
    assert frames == sorted(frames)
    for first in range(0, 30, 5):
        pairs = anchors_M[first + 1 : first + 5].view(2, 2)
        assert bool((pairs[:, 0] < pairs[:, 1]).all())
    rows = LAYOUTS["any resolution"]
    anchors = reduce_item(VisionZip(contextual=0.5), rows, Budget(retain=0.3)).anchor_BM[0].tolist()
    assert anchors == sorted(anchors)


def test_sizes_weigh() -> None:
    score_1L, x_1LE = torch.zeros(1, 3), torch.tensor([[[1.0, 0.0], [4.0, 0.0], [4.0, 0.0]]])
    sizes = torch.tensor([[2.0, 1.0, 3.0]])
    out = zip_planes(score_1L, x_1LE, 0, 1, size_TL=sizes).apply(x_1LE)
    assert out.tolist() == [[[3.0, 0.0]]]
    added = zip_planes(score_1L, x_1LE, 0, 1, size_TL=sizes, merge="add").apply(x_1LE)
    torch.testing.assert_close(added, torch.tensor([[[5.0, 0.0]]]))


def test_scores_only_rank() -> None:
    grid = LAYOUTS["image"]
    scores_N = torch.rand(grid.num_tokens, generator=torch.Generator().manual_seed(3))
    both = [
        reduce_item(VisionZip(), grid, Budget(retain=0.4), scores_N=scores).matrix()
        for scores in (scores_N, 3 * scores_N + 1)
    ]
    assert both[0].equal(both[1])


def test_keys_tell_what_is_alike() -> None:
    """Patches that share a key meet in one contextual token, whatever their features."""
    grid = Grid.image(4, 6, newlines_at_end=1)
    patches, kind_L = grid.patch_index(), torch.arange(24) // 6
    keys_IHMd = torch.zeros(1, 3, 25, 4)  # a [CLS] in front
    keys_IHMd[0, :, 1:] = torch.eye(4)[kind_L]
    view = replace(
        encoder_view(grid), q_IHMd=keys_IHMd, k_IHMd=keys_IHMd, num_prefix=1, has_cls=True
    )
    context = context_for(grid, Budget(tokens=8), torch.zeros(25))
    context.read_encoder = lambda layer: view
    reduction = VisionZip(contextual=0.5).projector(item(grid), context)
    assert reduction is not None
    group_L = reduction.groups_BN[0][patches]
    # The first four are dominant; of 20 others every fifth is contextual, one or two of each kind.
    assert group_L[:4].tolist() == [0, 1, 2, 3]
    target_of_kind = [group_L[4:][kind_L[4:] == kind].unique().tolist() for kind in range(4)]
    assert all(len(targets) == 1 for targets in target_of_kind)
    assert sorted(targets[0] for targets in target_of_kind) == [4, 5, 6, 7]


def test_keys_of_a_shortened_block_stand_for_all_their_patches() -> None:
    view = encoder_view(Grid.image(2, 2))
    keys = torch.tensor([[[[9.0], [1.0], [2.0]]]])  # [CLS] and two merged tokens
    merged = Reduction.merge(torch.tensor([[0, 1, 2, 2, 1]]), 3)
    view = replace(view, q_IHMd=keys, k_IHMd=keys, num_prefix=1, reduction=merged)
    assert mean_keys(view)[0, :, 0].tolist() == [1.0, 2.0, 2.0, 1.0]


def test_features_do_without_an_encoder() -> None:
    grid = LAYOUTS["image"]
    tokens = item(grid)
    context = context_for(grid, Budget(retain=0.4))
    context.encoder_layers = ()
    method = VisionZip(similarity="features")
    assert method.projector(tokens, context) is not None
    assert method.encoder_layers(12, 11) == () and VisionZip().encoder_layers(12, 10) == (10,)
    with pytest.raises(MissingSignalError, match=r"encoder\.attention"):
        VisionZip().projector(tokens, context)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="contextual is a share"):
        VisionZip(contextual=1.0)
    with pytest.raises(ValueError, match="merge must be"):
        VisionZip(merge="sum")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="similarity must be"):
        VisionZip(similarity="values")  # type: ignore[arg-type]
