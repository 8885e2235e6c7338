"""`foveate show` on pictures: what encoder methods merge and drop, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import foveate
from foveate.checkpoints import open_clip
from foveate.core.flops import encoder_flops
from foveate.errors import AttachmentError, RecipeError, UnsupportedVideoError
from foveate.models.dims import vision_dims
from foveate.video import Clip, FrameTransform
from foveate.view import Encoder, render_report, show_pictures, show_video
from foveate.view.layout import view_item
from tiny import tiny_encoder

HALF = (0.5, 0.5, 0.5)
SIDE = 6  # patches of a tiny encoder's picture, across and down


def encoder(family: str = "dinov2") -> Encoder:
    side = {"height": 48, "width": 48}
    return Encoder(tiny_encoder(family), FrameTransform(size=side, mean=HALF, std=HALF), "tiny")


def picture(seed: int = 0) -> Image.Image:
    """Patches of two colours and some noise, 48 x 48."""
    rng = np.random.default_rng(seed)
    board = rng.integers(0, 2, (SIDE, SIDE, 3)).repeat(8, axis=0).repeat(8, axis=1)
    return Image.fromarray((180 * board + rng.integers(0, 60, board.shape)).astype(np.uint8))


def film(frames: int) -> Clip:
    return Clip([picture(seed) for seed in range(frames)], fps=4)


@pytest.mark.parametrize("family", ["vit", "deit", "dinov2", "clip", "siglip"])
@pytest.mark.parametrize("name", ["tome", "zero_tprune", "gtp_vit", "token_transforming", "stvit"])
def test_a_picture_is_grouped_as_reduce_groups_it(name: str, family: str) -> None:
    one = encoder(family)
    report = show_video(Clip([picture()]), name, retain=0.5, encoder=one)
    (item,) = report.items
    x_1CHW = one.transform(Clip([picture()]).sample(1).pixels)
    with torch.no_grad(), foveate.reduce(one.model, name, retain=0.5) as run:
        one.tower.module(pixel_values=x_1CHW)
    assert item.reduction is not None and run.encoder_reduction is not None
    assert item.reduction.groups_BN.equal(run.encoder_reduction.groups_BN)
    assert item.modality == "image" and item.seconds is None
    # Only Zero-TPrune drops for good; the others draw a patch with what it has become part of.
    (plane,) = view_item(item).planes
    drops = name == "zero_tprune"
    assert (plane.num_dropped > 0) == drops and (plane.num_merged > 0) == (not drops)


def test_tokens_of_every_block_are_told() -> None:
    one = encoder()
    report = show_video(Clip([picture()]), "tome", retain=0.4, encoder=one)
    lengths, tokens = report.block_lengths, SIDE**2 + 1
    assert len(lengths) == len(one.tower.blocks) and lengths[0] == tokens == report.visual_before
    assert lengths == sorted(lengths, reverse=True) and lengths[-1] > report.visual_after
    # Blocks run their attention on these and their MLP on what the next one gets.
    dims = vision_dims(one.tower.module)
    mlp = [*lengths[1:], report.visual_after]
    counted = encoder_flops(dims, lengths, 1, mlp_lengths=mlp, num_patches=tokens)
    assert report.flops["reduced"]["encoder"] == counted
    assert report.as_dict()["block_lengths"] == lengths
    html = render_report(report)
    assert "Tokens in front of every encoder block" in html
    share = report.flops["reduced"]["total"] / report.flops["untouched"]["total"]
    assert f"{100 * share:.1f} % of the untouched" in html


def test_methods_that_join_frames_see_the_whole_clip() -> None:
    # Whatever batches frames are encoded in otherwise.
    one, clip = encoder(), film(6)
    small, whole = (
        show_video(clip, "tempme", retain=0.3, encoder=one, frames=6, batch=batch)
        for batch in (2, 6)
    )
    first, second = small.items[0].reduction, whole.items[0].reduction
    assert first is not None and second is not None
    assert first.groups_BN.equal(second.groups_BN)
    groups_TN = first.groups_BN[0].view(6, -1)
    assert set(groups_TN[0].tolist()) & set(groups_TN[5].tolist())  # merged over time


@pytest.mark.parametrize("name", ["tempme", "centerclip"])
def test_a_single_picture_has_no_frames_to_join(name: str) -> None:
    with pytest.raises(RecipeError, match=f"{name} joins frames of a video .* a single picture"):
        show_video(Clip([picture()]), name, retain=0.5, encoder=encoder())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hot", "runs on MixSTE of foveate.models.backbones alone"),
        ("tovim", "runs on VisionMamba"),
        ("s5", "runs on ViS4mer"),
        ("dtop", "pass weights='heads.safetensors'"),
    ],
)
def test_methods_without_their_backbone_or_heads_are_refused(name: str, message: str) -> None:
    with pytest.raises((AttachmentError, ValueError), match=message):
        show_video(Clip([picture()]), name, retain=0.5, encoder=encoder())


def test_several_pictures_become_one_report(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("one.png", "two.jpg", "three.webp")]
    for seed, path in enumerate(paths):
        picture(seed).save(path, quality=95)
    one = encoder()
    report = show_pictures(paths, "tome", retain=0.5, encoder=one)
    alone = [show_video(open_clip(path), "tome", retain=0.5, encoder=one) for path in paths]
    assert [item.name for item in report.items] == ["one.png", "two.jpg", "three.webp"]
    for item, other in zip(report.items, alone, strict=True):
        assert item.reduction is not None and other.items[0].reduction is not None
        assert item.reduction.groups_BN.equal(other.items[0].reduction.groups_BN)
    (stage,) = report.stages
    assert stage.before == (SIDE**2 + 1,) * 3
    assert sum(stage.after) == report.visual_after == sum(part.visual_after for part in alone)
    for row in ("untouched", "reduced"):
        assert report.flops[row]["total"] == sum(part.flops[row]["total"] for part in alone)
    assert report.block_lengths == [3 * number for number in alone[0].block_lengths]
    assert report.as_dict()["items"][1]["name"] == "two.jpg"
    html = render_report(report)
    assert html.count('class="view"') == html.count("<b>untouched</b>") == 3
    assert html.index("one.png") < html.index("two.jpg") < html.index("three.webp")


def test_a_film_among_pictures_is_refused() -> None:
    with pytest.raises(ValueError, match="6 frames: show one video at a time, or several pict"):
        show_pictures([film(1), film(6)], "tome", retain=0.5, encoder=encoder())
    with pytest.raises(ValueError, match="1 to 64 pictures at a time, got 0"):
        show_pictures([], "tome", encoder=encoder())


def test_pictures_of_sixteen_bits_are_not_white(tmp_path: Path) -> None:
    grey = np.asarray(picture().convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert (open_clip(tmp_path / "deep.png").sample(1).pixels[0, 1].numpy() == grey).all()


def test_a_picture_is_known_by_its_first_bytes_too(tmp_path: Path) -> None:
    path = tmp_path / "upload"
    picture().save(path, "PNG")
    clip = open_clip(path)
    assert len(clip) == 1 and clip.name == "upload"
    cut = tmp_path / "cut.png"
    cut.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UnsupportedVideoError, match="cannot read the picture"):
        open_clip(cut)
    (tmp_path / "words.png").write_text("no picture at all")
    with pytest.raises(UnsupportedVideoError, match="cannot identify image file"):
        open_clip(tmp_path / "words.png")
