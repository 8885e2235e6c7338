"""FoPru: significance, ranks and rows."""

from __future__ import annotations

import pytest
import torch

from foveate.core import Budget, EncoderAttentionView, Grid, Plane, ProjectorContext
from foveate.methods.fopru import FoPru, focal_choice, significance

from .helpers import item


def view_of(attention_IHMM: torch.Tensor, num_prefix: int = 0) -> EncoderAttentionView:
    """A block whose attention is given."""
    M = attention_IHMM.shape[-1]
    q_IHMM = torch.eye(M).expand_as(attention_IHMM) * M**0.5
    return EncoderAttentionView(
        q_IHMM, attention_IHMM.clamp_min(1e-30).log().mT, num_prefix=num_prefix
    )


def random_view(images: int, patches: int, num_prefix: int = 0) -> EncoderAttentionView:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, images, 3, patches + num_prefix, 8, generator=generator)
    return EncoderAttentionView(q, k, num_prefix=num_prefix)


def kept(grid: Grid, view: EncoderAttentionView, retain: float, strategy: str) -> torch.Tensor:
    context = ProjectorContext(
        Budget(retain=retain), grid=grid, encoder_layers=(0,), read_encoder={0: view}.get
    )
    method = FoPru(strategy)  # pyright: ignore[reportArgumentType]
    reduction = method.projector(item(grid), context)
    assert reduction is not None and set(context.state) == {"significance"}
    assert reduction.num_out == method.count(grid, context.budget).tokens
    return reduction.anchor_BM[0]


def focused(index: list[int], patches: int) -> EncoderAttentionView:
    """Every query attends to the same few patches."""
    row_N = torch.full((patches,), 1e-4)
    row_N[index] = 1.0
    return view_of((row_N / row_N.sum()).expand(1, 2, patches, patches))


def test_attention_on_one_row_keeps_that_row() -> None:
    row = list(range(18, 24))
    assert kept(Grid.image(6, 6), focused(row, 36), 1 / 6, "row").tolist() == row


def test_attention_on_scattered_patches_keeps_them() -> None:
    places = [0, 7, 19, 20, 35]
    assert kept(Grid.image(6, 6), focused(places, 36), 5 / 36, "rank").tolist() == places


def test_uniform_attention_keeps_the_lowest_indices() -> None:
    view = view_of(torch.full((1, 2, 36, 36), 1 / 36))
    assert kept(Grid.image(6, 6), view, 0.25, "rank").shape == (9,)
    score_1L = torch.full((1, 36), 1 / 36)
    assert focal_choice(score_1L, 6, 9).tolist() == [list(range(9))]
    assert focal_choice(score_1L, 6, 12, "row").tolist() == [list(range(12))]


def test_given_attention_wins_where_it_varies_more() -> None:
    """Behind a cut [CLS] column: patches receive alike and spend unlike on [CLS]."""
    spent_N = torch.linspace(0.1, 0.9, 9)
    rows_NM = torch.cat([spent_N[:, None], ((1 - spent_N) / 9)[:, None].expand(9, 9)], dim=1)
    whole_MM = torch.cat([torch.full((1, 10), 0.1), rows_NM])
    view = view_of(whole_MM.expand(1, 2, 10, 10), num_prefix=1)
    torch.testing.assert_close(significance(view)[0], (1 - spent_N) / 9)
    assert kept(Grid.image(3, 3), view, 1 / 3, "rank").tolist() == [0, 1, 2]


@pytest.mark.parametrize("strategy", ["rank", "row"])
@pytest.mark.parametrize("num_prefix", [0, 1])
def test_every_frame_keeps_its_share(strategy: str, num_prefix: int) -> None:
    grid = Grid.video(4, 6, 5)
    found = kept(grid, random_view(4, 30, num_prefix), 0.45, strategy)
    assert bool((found[1:] > found[:-1]).all())
    per_frame = (found // 30).bincount().tolist()
    assert per_frame == ([13] * 4 if strategy == "rank" else [10] * 4)
    if strategy == "row":
        assert (found // 5).bincount().tolist().count(5) == 8
    turned = random_view(4, 30, num_prefix)
    turned = EncoderAttentionView(
        turned.q_IHMd.flip(1), turned.k_IHMd.flip(1), num_prefix=num_prefix
    )
    assert kept(grid, turned, 0.45, strategy).equal(found)


def test_counts_are_rounded_down_to_at_least_one() -> None:
    grid = Grid((Plane(24, 24), Plane(8, 30)))
    assert FoPru().kept_per_plane(grid, Budget(retain=0.002)) == [1, 1]
    assert FoPru("row").kept_per_plane(grid, Budget(retain=0.002)) == [24, 30]
    assert FoPru().kept_per_plane(grid, Budget(retain=0.25)) == [144, 60]
    assert FoPru("row").kept_per_plane(grid, Budget(retain=0.25)) == [144, 60]
    assert FoPru("row").kept_per_plane(grid, Budget(retain=0.3)) == [168, 60]


def test_bad_strategy() -> None:
    with pytest.raises(ValueError, match='strategy must be "rank" or "row", got \'column\''):
        FoPru("column")  # pyright: ignore[reportArgumentType]
