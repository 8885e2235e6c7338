"""TS-LLaVA: published counts, the sample's invariants, the collage, and where the blocks lie."""

from __future__ import annotations

import pytest
import torch

import foveate
from foveate.checkpoints import read_chat
from foveate.core import Budget, Grid, ProjectorContext, TokenKind, Tokens
from foveate.methods.ts_llava import (
    TSLLaVA,
    collage_shape,
    frame_indices,
    messages,
    sample_indices,
    thumbnail,
)
from tiny import Sample, tiny_inputs, tiny_model

from .helpers import LAYOUTS, reduce_item

PUBLISHED = Grid.video(50, 24, 24)


# -- the sample -------------------------------------------------------------------------------


def test_published_counts() -> None:
    count = TSLLaVA().count(PUBLISHED, Budget(retain=TSLLaVA.card.retain))
    assert count.tokens == 2880 and count.exact
    assert count.tokens + TSLLaVA().count(Grid.image(24, 24), Budget(retain=0.1)).tokens == 3456
    longer = TSLLaVA().count(Grid.video(200, 24, 24), Budget(tokens=2880))
    assert longer.tokens == 2880, "the count does not depend on the length of the video"


def test_sample_has_both_ends_and_never_repeats() -> None:
    for num, sampled in ((28800, 2880), (10, 10), (97, 96), (1, 1), (325, 97), (2, 2)):
        index = sample_indices(num, sampled)
        assert len(index) == sampled and index[0] == 0 and index[-1] == num - 1
        assert bool((index.diff() > 0).all())
    assert sample_indices(5, 1).tolist() == [0]


def test_sample_follows_float32() -> None:
    """At the published size some positions differ from those of a line in float64."""
    index = sample_indices(28800, 2880)
    exact = torch.linspace(0, 28799, 2880, dtype=torch.float64).round().long()
    assert index.tolist() == torch.linspace(0, 28799, 2880).round().long().tolist()
    assert int((index - exact).abs().max()) <= 1


def test_too_large_samples_are_errors_unless_clamped() -> None:
    with pytest.raises(ValueError, match="cannot sample 11 of 10"):
        sample_indices(10, 11)
    assert sample_indices(10, 11, clamp=True).tolist() == list(range(10))
    with pytest.raises(ValueError, match="at least 1"):
        sample_indices(10, 0)


def test_needle_in_one_frame_keeps_its_share() -> None:
    """An object in one of 50 frames keeps at least 57 tokens of that frame; columns drift."""
    kept = reduce_item(TSLLaVA(), PUBLISHED, Budget(retain=0.1), Tokens(torch.zeros(1, 28800, 1)))
    frame_K = kept.anchor_BM[0] // 576
    per_frame = torch.bincount(frame_K, minlength=50)
    assert per_frame.min() >= 57 and per_frame.max() <= 59
    column_K = kept.anchor_BM[0] % 24
    assert len(column_K.unique()) == 24, "every column is seen over time"


def test_newlines_and_class_tokens() -> None:
    grid = LAYOUTS["video, newline at end"]
    anchors = reduce_item(TSLLaVA(), grid, Budget(retain=0.2)).anchor_BM[0]
    assert anchors[-1] == grid.num_tokens - 1 and len(anchors) == 31
    for name in ("video, newline per row", "video, [CLS] per frame"):
        grid = LAYOUTS[name]
        anchors = reduce_item(TSLLaVA(), grid, Budget(retain=0.2)).anchor_BM[0]
        kinds = grid.kinds()[anchors]
        assert int((kinds == TokenKind.PATCH).sum()) == 24
        assert len(anchors) == TSLLaVA().count(grid, Budget(retain=0.2)).tokens


def test_images_stay_whole() -> None:
    grid = LAYOUTS["image"]
    context = ProjectorContext(Budget(retain=0.1), grid=grid, grids=(grid,))
    assert TSLLaVA().projector(Tokens(torch.zeros(1, 48, 4)), context) is None


@pytest.mark.parametrize("order", ["sampled_first", "thumbnail_first"])
def test_blocks_are_sampled_apart(order) -> None:
    """The thumbnail frame is never thinned and never part of the line."""
    method = TSLLaVA(thumbnail="frame", order=order)
    grid = Grid.video(6, 5, 5)
    kept = reduce_item(method, grid, Budget(retain=0.2)).anchor_BM[0]
    assert len(kept) == 25 + 25 == method.count(grid, Budget(retain=0.2)).tokens
    start = 0 if order == "thumbnail_first" else 125
    assert kept[:25].tolist() == list(range(25)) or order == "sampled_first"
    frames_K = kept[(kept < start) | (kept >= start + 25)]
    first = 25 if order == "thumbnail_first" else 0
    assert frames_K.tolist() == (sample_indices(125, 25) + first).tolist()
    only = Grid.video(1, 5, 5)
    assert method.count(only, Budget(retain=0.2)).tokens == 25


# -- the thumbnail ----------------------------------------------------------------------------


def test_collage_of_identical_frames_is_the_frame_tiled() -> None:
    frame = torch.rand(3, 12, 18, generator=torch.Generator().manual_seed(0))
    made = thumbnail(frame.expand(9, -1, -1, -1), 6, height=36, width=36)
    torch.testing.assert_close(made, frame.repeat(1, 3, 2))


def test_collage_runs_in_time_by_rows() -> None:
    level = torch.arange(11.0)[:, None, None, None].expand(-1, 3, 8, 8)
    made = thumbnail(level, 6, height=12, width=12)
    assert made[0, ::4, ::6].tolist() == [[0.0, 2.0], [4.0, 6.0], [8.0, 10.0]]
    coloured = (level * 20).to(torch.uint8)
    assert thumbnail(coloured, 6, 12, 12).dtype == torch.uint8
    assert thumbnail(coloured, 6, 12, 12)[0, ::4, ::6].tolist()[2] == [160, 200]


def test_collage_size_is_what_whole_cells_make() -> None:
    assert thumbnail(torch.zeros(9, 3, 8, 8), 8, 34, 33).shape == (3, 32, 32)
    assert thumbnail(torch.zeros(9, 3, 8, 8), 7, 21, 9).shape == (3, 21, 9)
    assert collage_shape(5) == (5, 1)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((3, 3, 8, 8), {"num_frames": 4}, "collage of 4 frames"),
        ((3, 8, 8), {}, r"\[T, C, H, W\]"),
        ((9, 3, 8, 8), {"num_frames": 7, "height": 6}, "do not fit"),
    ],
)
def test_impossible_collages(shape: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        thumbnail(torch.zeros(shape), **options)


def test_frame_indices_are_segment_middles() -> None:
    index = frame_indices(500, 50)
    assert len(index) == 50 and index == sorted(set(index))
    assert index[0] == 5 and index[-1] == 494
    with pytest.raises(ValueError, match="at least 1"):
        frame_indices(0, 5)


# -- in a prompt ------------------------------------------------------------------------------


def clip(frames: int = 60) -> torch.Tensor:
    level = torch.arange(frames, dtype=torch.uint8)
    return level[:, None, None, None].expand(-1, 3, 8, 8).contiguous()


def test_messages_for_video_models() -> None:
    (turn,) = messages(clip(), "What happens?", size=(24, 24))
    assert [part["type"] for part in turn["content"]] == ["video", "image", "text"]
    assert turn["content"][-1]["text"].endswith("What happens?")
    chat = read_chat([turn], max_frames=50)
    assert chat.layout == (1, (50,))
    assert chat.images[0].size == (24, 24)
    first = messages(clip(), "?", order="thumbnail_first")[0]["content"]
    assert [part["type"] for part in first] == ["image", "video", "text"]


def test_messages_for_image_models() -> None:
    (turn,) = messages(clip(), "?", num_frames=10, as_images=True, size=(24, 24))
    chat = read_chat([turn])
    assert chat.layout == (11, ())
    shown = [image.getpixel((0, 0))[0] for image in chat.images[:10]]
    assert shown == frame_indices(60, 10)
    with pytest.raises(ValueError, match="uint8"):
        messages(clip().float(), "?")


def test_frames_and_thumbnail_in_an_image_model() -> None:
    """Four frames and a thumbnail as images: together the strided sample, then a whole image."""
    model = tiny_model("llava")
    inputs = tiny_inputs("llava", samples=(Sample(text=(2,) * 6, items=("image",) * 5),))
    with torch.no_grad(), foveate.reduce(model, TSLLaVA(images_as_frames=4), tokens=30) as run:
        model(**inputs)
        kept = [
            torch.arange(item.before) if item.reduction is None else item.reduction.anchor_BM[0]
            for item in run.report.items
        ]
    N = run.report.items[0].before
    joined = torch.cat([index + N * i for i, index in enumerate(kept[:4])])
    assert joined.tolist() == sample_indices(4 * N, 30).tolist()
    assert len(kept[4]) == N
    with (
        torch.no_grad(),
        foveate.reduce(model, TSLLaVA(images_as_frames=6), retain=0.5),
        pytest.raises(ValueError, match="6 images as frames, this sample has 5"),
    ):
        model(**inputs)


def test_frames_without_a_sampled_token_vanish() -> None:
    model = tiny_model("llava")
    inputs = tiny_inputs("llava", samples=(Sample(text=(2,) * 6, items=("image",) * 5),))
    with torch.no_grad(), foveate.reduce(model, TSLLaVA(images_as_frames=5), tokens=2) as run:
        assert torch.isfinite(model(**inputs).logits).all()
    assert [item.after for item in run.report.items] == [1, 0, 0, 0, 1]


@pytest.mark.parametrize(
    "arguments", [{"images_as_frames": 0}, {"order": "last"}, {"thumbnail": "video"}], ids=str
)
def test_bad_arguments(arguments: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        TSLLaVA(**arguments)
