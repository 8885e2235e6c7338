"""Recoverable Compression: who is kept, recovered, merged, and how many."""

from __future__ import annotations

import pytest
import torch

from foveate.core import Budget, EncoderAttentionView, Grid, ProjectorContext, Tokens
from foveate.core.context import SIGNALS
from foveate.methods.recoverable import Recoverable, meet_budget, outlier_counts, recover

from .helpers import LAYOUTS, encoder_view, item

PUBLISHED = Budget(retain=0.1, published=True)


def scores(planes: int = 2, patches: int = 144, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Attention with a heavy tail, similarities with some, keys."""
    generator = torch.Generator().manual_seed(seed)
    vision_TL = torch.rand(planes, patches, generator=generator) ** 8
    text_TL = 0.01 * torch.randn(planes, patches, generator=generator) ** 3
    key_TLC = torch.randn(planes, patches, 12, generator=generator)
    return vision_TL / vision_TL.sum(1, keepdim=True), text_TL, key_TLC


def context_of(
    grid: Grid, budget: Budget, text_N: torch.Tensor | None = None, seed: int = 0
) -> ProjectorContext:
    if text_N is None:
        text_N = torch.randn(grid.num_tokens, generator=torch.Generator().manual_seed(seed)) ** 3
    view = encoder_view(grid, seed)
    assert "text.patch_similarity" in SIGNALS
    return ProjectorContext(
        budget,
        "recoverable",
        grid=grid,
        read={"text.patch_similarity": text_N[None]}.get,
        encoder_layers=(3,),
        read_encoder={3: view}.get,
    )


def test_the_three_kinds_are_disjoint_and_best() -> None:
    vision_TL, text_TL, key_TLC = scores()
    counts_T3 = outlier_counts(vision_TL, text_TL)
    found = recover(vision_TL, text_TL, key_TLC, counts_T3)
    for t, (num_vision, num_text, num_centres) in enumerate(counts_T3.tolist()):
        assert num_vision > 1 and num_text > 1
        order = vision_TL[t].argsort(descending=True).tolist()
        vision = order[:num_vision]
        assert set(found.vision_TL[t].nonzero()[:, 0].tolist()) == set(vision)
        asked = [i for i in text_TL[t].argsort(descending=True).tolist() if i not in vision]
        assert set(found.text_TL[t].nonzero()[:, 0].tolist()) == set(asked[:num_text])
        rest = [i for i in order if i not in vision and i not in asked[:num_text]]
        assert found.centre_TK[t, :num_centres].tolist() == rest[:num_centres]
        assert (found.centre_TK[t, num_centres:] == -1).all()


def test_a_centre_takes_in_what_is_like_it() -> None:
    vision_TL, text_TL, key_TLC = scores(1)
    found = recover(vision_TL, text_TL, key_TLC, torch.tensor([[10, 5, 3]]), merged=4)
    rest = set(found.rest_TL[0].nonzero()[:, 0].tolist())
    for centre, near in zip(found.centre_TK[0].tolist(), found.near_TKk[0].tolist(), strict=True):
        alike = {
            j: float(torch.cosine_similarity(key_TLC[0, centre], key_TLC[0, j], dim=0))
            + 50 * float(text_TL[0, j])
            for j in rest - {centre}
        }
        assert near == sorted(alike, key=alike.__getitem__, reverse=True)[:4]


def test_the_needle_of_the_text_is_recovered() -> None:
    """A patch that nobody looks at stays when the question is about it, and only then."""
    vision_TL, text_TL, key_TLC = scores(1)
    needle = int(vision_TL[0].argmin())
    text_TL[0, needle] = 0.5
    found = recover(vision_TL, text_TL, key_TLC, outlier_counts(vision_TL, text_TL))
    assert found.text_TL[0, needle] and not found.vision_TL[0, needle]
    text_TL[0, needle] = float(text_TL.min())
    found = recover(vision_TL, text_TL, key_TLC, outlier_counts(vision_TL, text_TL))
    assert found.rest_TL[0, needle]


def test_one_patch_stays_where_nothing_stands_out() -> None:
    flat_TL = torch.full((2, 30), 1 / 30)
    for width in (None, 12):
        counts_T3 = outlier_counts(flat_TL, torch.zeros(2, 30), released_width=width)
        assert counts_T3.tolist() == [[1, 0, 0]] * 2


@pytest.mark.parametrize("keep", [1, 2, 3, 5, 14, 57, 99, 100])
def test_budgets_are_met_exactly(keep: int) -> None:
    generator = torch.Generator().manual_seed(keep)
    counts_T3 = torch.randint(0, 20, (50, 3), generator=generator)
    counts_T3[:, 0] += 1
    scaled_T3 = meet_budget(counts_T3, keep, 100)
    summary_T = (scaled_T3[:, 2] > 0).long()
    assert (scaled_T3.sum(1) + summary_T == keep).all()
    assert (scaled_T3 >= 0).all() and (scaled_T3[:, :2].sum(1) >= 1).all()
    left_T = keep - summary_T
    exact_T3 = left_T[:, None] * counts_T3 / counts_T3.sum(1, keepdim=True)
    if 1 < keep < 100:
        has_T = summary_T.bool()
        assert ((scaled_T3 - exact_T3)[has_T].abs() < 1).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("budget", [Budget(retain=0.3), Budget(tokens=20), PUBLISHED])
def test_counts_of_every_layout(layout: str, budget: Budget) -> None:
    grid, method = LAYOUTS[layout], Recoverable()
    reduction = method.projector(item(grid), context_of(grid, budget))
    assert reduction is not None
    counted = method.count(grid, budget)
    assert reduction.num_out <= counted.tokens
    assert reduction.num_out == counted.tokens or not counted.exact
    assert counted.exact == (
        not budget.published and not any(plane.row_newline for plane in grid.planes)
    )


def test_output_order_and_sums() -> None:
    grid, method = Grid.image(12, 12), Recoverable(merged=5)
    tokens, context = item(grid), context_of(grid, Budget(tokens=40))
    context.encoder_layers = (3,)
    vision_TL, _, key_TLC = scores(1)
    # A block whose [CLS] row is the given attention: one head of one channel.
    q = torch.cat([torch.ones(1), torch.zeros(144)])[None, None, :, None]
    k = torch.cat([torch.full((1,), -50.0), vision_TL[0].log()])[None, None, :, None]
    view = EncoderAttentionView(q, k, num_prefix=1, has_cls=True)
    context.read_encoder = {3: view}.get
    reduction = method.projector(tokens, context)
    assert reduction is not None
    matrix_MN = reduction.matrix()[0]
    out_MD = reduction.apply(tokens.x_BND)[0]
    anchor = reduction.anchor_BM[0].tolist()
    num_kept = max(i for i in range(1, 41) if sorted(anchor[:i]) == anchor[:i])
    kept = [m for m in range(40) if matrix_MN[m].count_nonzero() == 1]
    assert kept == list(range(len(kept))) and 0 < len(kept) < 39 and num_kept >= len(kept)
    assert torch.equal(out_MD[kept], tokens.x_BND[0, anchor[: len(kept)]])
    centres = anchor[len(kept) : 39]
    assert vision_TL[0, centres].diff().lt(0).all()
    for m, centre in enumerate(centres, start=len(kept)):
        others_N = matrix_MN[m].clone()
        others_N[centre] -= 1
        taken_R = others_N.nonzero()[:, 0]
        assert len(taken_R) == 5
        torch.testing.assert_close(others_N[taken_R], vision_TL[0, taken_R], atol=1e-6, rtol=1e-4)
    summed_N = vision_TL[0].clone()
    summed_N[anchor[:39]] = 0
    torch.testing.assert_close(matrix_MN[39], summed_N, atol=1e-6, rtol=1e-4)
    assert key_TLC.shape[1] == 144


def test_planes_are_on_their_own() -> None:
    grid = Grid.video(4, 6, 6)
    text_N = torch.randn(144, generator=torch.Generator().manual_seed(9)) ** 3
    tokens, view = item(grid), encoder_view(Grid.image(6, 6))
    joined = EncoderAttentionView(view.q_IHMd.repeat(4, 1, 1, 1), view.k_IHMd.repeat(4, 1, 1, 1))
    context = context_of(grid, Budget(retain=0.3), text_N)
    context.read_encoder = {3: joined}.get
    together = Recoverable().projector(tokens, context)
    assert together is not None
    for t in range(4):
        alone = Grid.video(1, 6, 6)
        single = context_of(alone, Budget(retain=0.3), text_N[36 * t : 36 * (t + 1)])
        single.read_encoder = {3: view}.get
        x_ND = tokens.x_BND[0, 36 * t : 36 * (t + 1)]
        reduction = Recoverable().projector(Tokens.from_grid(x_ND, alone), single)
        assert reduction is not None
        mine = [a - 36 * t for a in together.anchor_BM[0].tolist() if a // 36 == t]
        assert mine == reduction.anchor_BM[0].tolist()


def test_released_and_right_differ() -> None:
    grid = Grid.image(14, 14)
    made = []
    for released in (False, True):
        context = context_of(grid, PUBLISHED)
        made.append(Recoverable(released=released).projector(item(grid), context))
    right, theirs = made
    assert right is not None and theirs is not None
    assert right.num_out != theirs.num_out or not right.matrix().equal(theirs.matrix())


def test_evidence() -> None:
    from foveate.core.evidence import Notebook

    grid, seen = Grid.video(2, 6, 6, newlines_at_end=1), []
    context = context_of(grid, Budget(retain=0.5))
    context.notebook = Notebook("projector", (grid.num_tokens,), seen.append)
    reduction = Recoverable().projector(item(grid), context)
    assert reduction is not None
    by_name = {noted.name: noted for noted in seen}
    marks = sum(by_name[n].value.long() for n in ("kept by vision", "recovered by text", "centres"))
    assert marks.max() == 1 and {"text similarity", "received attention"} <= set(by_name)
    assert set(marks.nonzero()[:, 0].tolist()) <= set(reduction.anchor_BM[0].tolist())


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"neighbours": 0}, "neighbours must be at least 1"),
        ({"centre_neighbours": -1}, "centre_neighbours must be at least 1"),
        ({"merged": 0}, "merged must be at least 1"),
        ({"text_weight": -1.0}, "text_weight must not be negative"),
        ({"text_weight": float("nan")}, "text_weight must not be negative"),
    ],
)
def test_bad_arguments(arguments: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Recoverable(**arguments)
