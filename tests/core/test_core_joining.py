"""Reductions of several images as one of a row that holds them, and back."""

from __future__ import annotations

import pytest
import torch

from foveate.core import Budget, EncoderContext, Grid, Reduction, join_rows, split_rows


def reductions() -> dict[str, Reduction]:
    generator = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(5, generator=generator)[:3] for _ in range(4)])
    ragged = torch.tensor([[0, 2, 4], [1, -1, -1], [3, 4, -1], [0, 1, 2]])
    assignment = torch.randint(0, 3, (4, 5), generator=generator)
    assignment[:, :3] = torch.arange(3)
    dropped = assignment.clone()
    dropped[:, 4] = -1
    weight = torch.rand(4, 5, generator=generator) + 0.1
    matrix = torch.rand(4, 3, 5, generator=generator)
    mask = torch.arange(4)[:, None] + 1 > torch.arange(3)
    features = torch.randn(4, 3, 2, generator=generator)
    return {
        "select": Reduction.select(index, 5),
        "ragged": Reduction.select(ragged, 5),
        "merge": Reduction.merge(assignment, 3, weight),
        "dropping": Reduction.merge(dropped, 3),
        "transform": Reduction.transform(matrix),
        "sparse": Reduction.transform((matrix * (matrix > 0.5)).to_sparse()),
        "padded": Reduction.transform(matrix, mask_BM=mask),
        "synthesise": Reduction.synthesise(features, 5, matrix),
        "queries": Reduction.synthesise(features, 5),
    }


@pytest.mark.parametrize("num", [1, 2, 4])
@pytest.mark.parametrize("name", reductions())
def test_a_row_of_images_does_what_they_do(name: str, num: int) -> None:
    one = reductions()[name]
    row = join_rows(one, num)
    assert (row.batch, row.num_in, row.num_out) == (4 // num, 5 * num, 3 * num)
    assert row.counts_B.sum() == one.counts_B.sum()
    anchors = one.anchor_BM + 5 * (torch.arange(4) % num)[:, None]
    assert row.anchor_BM.view(4, 3).tolist() == anchors.where(one.anchor_BM >= 0, -1).tolist()
    if name == "queries":
        assert row.features_BMD is not None and one.features_BMD is not None
        assert torch.equal(row.features_BMD.view(4, 3, 2), one.features_BMD)
        return
    x = torch.randn(4, 5, 2, generator=torch.Generator().manual_seed(1))
    y = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(2))

    def beside(t: torch.Tensor) -> torch.Tensor:
        return t.reshape(4 // num, -1, *t.shape[2:])

    torch.testing.assert_close(row.apply(beside(x)), beside(one.apply(x)))
    torch.testing.assert_close(row.restore(beside(y)), beside(one.restore(y)))
    torch.testing.assert_close(
        row.sizes(beside(x[..., 0].abs())), beside(one.sizes(x[..., 0].abs()))
    )
    offset = 3 * (torch.arange(4) % num)[:, None]
    groups = (one.groups_BN + offset).where(one.groups_BN >= 0, -1)
    assert row.groups_BN.view(4, 5).tolist() == groups.tolist()


@pytest.mark.parametrize("num", [2, 4])
@pytest.mark.parametrize("name", ["select", "ragged", "merge", "dropping"])
def test_splitting_a_row_says_where_tokens_of_each_image_went(name: str, num: int) -> None:
    row = join_rows(reductions()[name], num)
    later = Reduction.merge(torch.arange(row.num_out).expand(row.batch, -1) % 4, 4)
    row = row.then(later)
    mine = split_rows(row, num)
    assert (mine.batch, mine.num_in, mine.num_out) == (4, 5, 4)
    assert torch.equal(mine.groups_BN.view(row.batch, -1), row.groups_BN)
    y = torch.randn(row.batch, 4, 2)
    torch.testing.assert_close(
        mine.restore(y.repeat_interleave(num, 0)), row.restore(y).view(4, 5, 2)
    )


def test_images_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="4 samples cannot be joined 3 by 3"):
        join_rows(Reduction.identity(5, 4), 3)


def test_which_images_are_frames() -> None:
    def context(layouts: list, images: int) -> EncoderContext:
        return EncoderContext(Budget(0.5), "m", num_images=images, layouts=lambda: layouts)

    def clip(frames: int) -> list:
        grid = Grid.video(frames, 2, 2)
        return [(grid, plane) for plane in range(frames)]

    image = (Grid.image(2, 2), 0)
    assert context([*clip(3), *clip(3)], 6).video_frames() == 3
    assert context([image, image], 2).video_frames(2) == 0
    for layouts in ([*clip(3), *clip(2)], [*clip(3), image]):
        with pytest.raises(ValueError, match="as many frames"):
            context(layouts, len(layouts)).video_frames()
    alone = EncoderContext(Budget(0.5), "m", num_images=6)
    assert (alone.video_frames(), alone.video_frames(2)) == (6, 2)
    with pytest.raises(ValueError, match="4 frames each"):
        alone.video_frames(4)
