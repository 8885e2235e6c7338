from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from foveate.checkpoints import open_clip
from foveate.core import Budget, ProjectorContext, Recipe, Tokens, get_method
from foveate.errors import (
    AttachmentError,
    MissingSignalError,
    RecipeError,
    UnknownModelError,
    VideoNotFoundError,
)
from foveate.methods.hiprune import hierarchical_choice
from foveate.video import Clip, FrameTransform
from foveate.view import Encoder, load_encoder, show_video
from foveate.view.costs import stages_not_run
from foveate.view.show import _pooled
from tiny import tiny_encoder

HALF = (0.5, 0.5, 0.5)


def encoder(family: str = "dinov2") -> Encoder:
    side = {"height": 48, "width": 48}
    return Encoder(tiny_encoder(family), FrameTransform(size=side, mean=HALF, std=HALF), "tiny")


def clip(frames: int = 8) -> Clip:
    """A bright square that wanders over a dark ground, with a cut in the middle."""
    pixels = torch.full((frames, 3, 60, 90), 30, dtype=torch.uint8)
    for t in range(frames):
        pixels[t, :, 10:30, 5 * t : 5 * t + 20] = 220
    pixels[frames // 2 :, 0] += 90 * (pixels[frames // 2 :, 0] < 100).byte()
    return Clip(pixels, fps=4)


@pytest.mark.parametrize("family", ["vit", "deit", "dinov2", "clip", "siglip"])
def test_divprune_keeps_its_budget_on_every_encoder(family: str) -> None:
    report = show_video(clip(), "divprune", retain=0.25, encoder=encoder(family), frames=4)
    assert (report.visual_before, report.visual_after) == (4 * 9, 9)  # 6 x 6 patches pooled
    assert [stage.stage for stage in report.stages] == ["projector"]
    assert report.items[0].seconds == [0.0, 0.5, 1.0, 1.75]
    assert set(report.seconds) == {"decode", "encode", "reduce"}
    pixels = report.items[0].pixels()
    assert pixels.shape == (4, 3, 60, 90) and pixels.dtype == torch.uint8


def test_holitom_gets_the_pooled_features_and_received_attention_of_the_encoder() -> None:
    # The same by hand: eager attention weights of the last block, pooled as the features.
    model = tiny_encoder("dinov2", attn="eager")
    source = clip()
    report = show_video(source, "holitom", retain=0.3, encoder=encoder(), frames=6, batch=4)
    frames = source.sample(6)
    x_TCHW = encoder().transform(frames.pixels)
    with torch.no_grad():
        output = model(pixel_values=x_TCHW, output_attentions=True)
    # [CLS] takes no part, as query or as key.
    weight_TNN = output.attentions[-1][:, :, 1:, 1:]
    score_TP = (weight_TNN / weight_TNN.sum(-1, keepdim=True)).mean(1).mean(1)
    x_TPC = _pooled(output.last_hidden_state[:, 1:], 6, 6)
    score_TP = _pooled(score_TP[..., None], 6, 6)[..., 0]
    method, grid = get_method("holitom")(), report.items[0].grid
    context = ProjectorContext(
        budget=Budget(retain=0.3),
        method="holitom",
        grid=grid,
        read=lambda n: score_TP.reshape(1, -1),
    )
    expected = method.projector(Tokens.from_grid(x_TPC.flatten(0, 1), grid), context)
    got = report.items[0].reduction
    assert got is not None and expected is not None
    assert torch.equal(got.groups_BN, expected.groups_BN)
    assert list(report.items[0].segments) == context.state["segments"]
    assert ("holitom", "decoder") in stages_not_run(Recipe.of("holitom"))
    assert "holitom at the decoder: not run, needs a language model" in report.notes


@pytest.mark.parametrize("pool", [True, False])
def test_methods_that_read_blocks_get_those_of_all_batches(pool: bool) -> None:
    # Objects from block 2 of 4, registers from the last: by hand from the eager weights.
    model, source = tiny_encoder("dinov2", attn="eager"), clip()
    run = {"encoder": encoder(), "frames": 6, "batch": 4, "pool": pool}
    report = show_video(source, "hiprune(alpha=0.6)", retain=0.4, **run)
    with torch.no_grad():
        x_TCHW = encoder().transform(source.sample(6).pixels)
        weights = model(pixel_values=x_TCHW, output_attentions=True).attentions
    maps = [weights[block].mean((1, 2))[:, 1:] for block in (1, 3)]
    if pool:
        maps = [_pooled(map_TP[..., None], 6, 6)[..., 0] for map_TP in maps]
    side = 3 if pool else 6
    keep = round(0.4 * side**2)
    kept_TK = hierarchical_choice(*maps, side, keep, alpha=0.6)
    expected_TK = kept_TK + side**2 * torch.arange(6)[:, None]
    got = report.items[0].reduction
    assert got is not None
    assert got.anchor_BM[0].tolist() == expected_TK.flatten().tolist()


def test_blocks_of_a_shortened_encoder_are_joined_too() -> None:
    recipe = "tome(retain=0.6)@encoder + fopru(retain=0.5)"
    reports = [
        show_video(clip(), recipe, encoder=encoder(), frames=6, batch=batch) for batch in (6, 4)
    ]
    whole, parts = (report.items[0].reduction for report in reports)
    assert whole is not None and parts is not None
    assert whole.anchor_BM.equal(parts.anchor_BM)


def test_pooling_is_that_of_llava_onevision() -> None:
    from tiny import tiny_model

    model = tiny_model("llava_onevision")
    x_TPC = torch.randn(3, 36, 32)
    assert torch.allclose(_pooled(x_TPC, 6, 6), model.model.apply_pooling(x_TPC), atol=1e-6)


def test_pooling_can_be_switched_off_and_images_are_not_pooled() -> None:
    report = show_video(clip(), "divprune", retain=0.5, encoder=encoder(), frames=2, pool=False)
    assert report.visual_before == 2 * 36
    image = show_video(Clip(clip().sample(1).pixels), "divprune", retain=0.5, encoder=encoder())
    assert image.items[0].modality == "image" and image.visual_before == 36


def test_tome_runs_inside_the_encoder_and_its_groups_stay_within_frames() -> None:
    report = show_video(clip(), "tome", retain=0.4, encoder=encoder(), frames=4, batch=3)
    item = report.items[0]
    assert item.reduction is not None
    (stage,) = report.stages
    assert stage.stage == "encoder" and sum(stage.after) == item.after < item.before
    group_TN = item.reduction.groups_BN[0].reshape(4, -1)
    for t in range(4):
        others = torch.cat([group_TN[:t].flatten(), group_TN[t + 1 :].flatten()])
        assert not torch.isin(group_TN[t], others).any()
    flops = report.flops
    assert flops["reduced"]["encoder"] < flops["untouched"]["encoder"]
    assert "prefill (reference 7B LLM)" not in flops["untouched"]
    assert list(report.seconds) == ["decode", "encode", "encoder methods", "reduce"]


def test_encoder_and_projector_stages_compose() -> None:
    report = show_video(
        clip(), "tome(retain=0.5)@encoder + holitom", retain=0.3, encoder=encoder(), frames=4
    )
    assert [stage.stage for stage in report.stages] == ["encoder", "projector"]
    assert report.visual_before == 36


def test_retain_one_keeps_everything() -> None:
    report = show_video(clip(), "holitom", retain=1.0, encoder=encoder(), frames=4)
    assert report.visual_after == report.visual_before and report.retained == 1.0


def test_the_encoder_is_left_as_it_was() -> None:
    one = encoder()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in one.model.modules()]
    show_video(clip(), "tome(retain=0.5)@encoder + holitom", retain=0.3, encoder=one, frames=4)
    with pytest.raises(MissingSignalError):
        show_video(clip(), "holitom(scores='cls')", encoder=encoder("siglip"), frames=2)
    after = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in one.model.modules()]
    assert hooks == after


def test_recipes_that_need_a_language_model_are_refused() -> None:
    with pytest.raises(RecipeError, match="fastv acts only at: decoder"):
        show_video(clip(), "fastv", retain=0.5, encoder=encoder())


def test_short_clips_give_all_their_frames_and_say_so() -> None:
    report = show_video(clip(4), "divprune", retain=0.5, encoder=encoder(), frames=32)
    assert len(report.items[0].grid.planes) == 4
    assert any("has 4 frames, fewer than the 32" in note for note in report.notes)


def test_pictures_show_what_a_cropping_encoder_sees() -> None:
    crop = FrameTransform(size={"shortest_edge": 48}, crop_size=(48, 48), mean=HALF, std=HALF)
    cropping = Encoder(tiny_encoder("clip"), crop)
    report = show_video(clip(), "divprune", retain=0.5, encoder=cropping, frames=2)
    assert report.items[0].pixels().shape == (2, 3, 48, 48)


def test_prefill_of_the_reference_model_is_that_of_the_paper() -> None:
    # 32 x 196 visual tokens in LLaVA-OneVision-7B: HoliTom counts 40.8 T multiply-adds for the
    # square-projection, two-matrix rule; grouped queries and gates make it 2 x 48.8.
    from foveate.core.flops import prefill_flops
    from foveate.view.costs import REFERENCE_LLM

    assert round(prefill_flops(REFERENCE_LLM, 32 * 196) / 1e12, 1) == 97.6


@pytest.mark.parametrize("family", ["vit", "dinov2", "clip", "siglip"])
def test_encoders_load_from_disk_with_or_without_preprocessing(tmp_path: Path, family: str) -> None:
    tiny_encoder(family).save_pretrained(tmp_path)
    loaded = load_encoder(tmp_path)
    assert loaded.transform.output_size(60, 90) == (48, 48)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"do_resize": true, "size": {"height": 32, "width": 32}, "do_normalize": false}'
    )
    assert load_encoder(tmp_path).transform.output_size(60, 90) == (32, 32)
    report = show_video(clip(), "divprune", retain=0.5, encoder=tmp_path, frames=2, size=64)
    assert report.visual_before == 2 * 16  # 8 x 8 patches pooled; the position table is stretched
    with pytest.raises(ValueError, match="50 is no multiple of the encoder's patches of 8"):
        load_encoder(tmp_path, size=50)


def test_what_is_no_encoder_is_refused(tmp_path: Path) -> None:
    from tiny import tiny_model

    tiny_model("llava").config.save_pretrained(tmp_path)
    with pytest.raises(UnknownModelError, match="multimodal model"):
        load_encoder(tmp_path)
    with pytest.raises(UnknownModelError, match="no such folder"):
        load_encoder(tmp_path / "missing")
    with pytest.raises(UnknownModelError, match="cannot load"):
        load_encoder(tmp_path / "..")


def test_pictures_open_as_clips_of_one_frame(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    Image.new("RGB", (20, 10), (1, 2, 3)).save(path)
    one = open_clip(path)
    assert len(one) == 1 and one.sample(1).pixels[0, :, 0, 0].tolist() == [1, 2, 3]
    with pytest.raises(VideoNotFoundError):
        open_clip(tmp_path / "missing.png")
    assert issubclass(MissingSignalError, AttachmentError)
