from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, PACKED_SETTINGS, save_checkpoint, square
from PIL import Image

from foveate.checkpoints import load_model, prepare, sample_frames
from foveate.checkpoints.processors import NoVideo, PackedFrames, StackedFrames, fit_pixels
from foveate.errors import UnknownModelError
from foveate.video import Clip
from foveate.view import ask

VIDEO_FAMILIES = [family for family in FAMILIES if family != "llava"]


def frames(count: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (count, 3, 5, 8), generator=generator).byte()
    return coarse.repeat_interleave(8, 2).repeat_interleave(8, 3)


@pytest.fixture(scope="module")
def onevision(tmp_path_factory: pytest.TempPathFactory):
    folder = save_checkpoint("llava_onevision", tmp_path_factory.mktemp("llava_onevision"))
    return load_model(folder)


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_videos_of_every_family_are_answered_untouched_and_reduced(
    family: str, tmp_path: Path
) -> None:
    model, processor = load_model(save_checkpoint(family, tmp_path))
    plain = ask(model, processor, Clip(frames(), fps=2), "what is in the video", max_new_tokens=4)
    full = ask(
        model,
        processor,
        Clip(frames(), fps=2),
        "what is in the video",
        "divprune",
        retain=1.0,
        max_new_tokens=4,
    )
    assert plain.text == full.text and plain.new_tokens == 4
    report = ask(
        model,
        processor,
        Clip(frames(), fps=2),
        "what is in the video",
        "divprune",
        retain=0.3,
        max_new_tokens=4,
    ).report
    assert 0 < report.visual_after < report.visual_before < plain.prompt_tokens
    assert report.items[0].modality == "video"
    assert report.items[0].seconds == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    assert report.items[0].pixels().shape == (6, 3, 40, 64)
    again = ask(model, processor, Clip(frames(), fps=2), "what is in the video", max_new_tokens=4)
    assert again.text == plain.text


@pytest.mark.parametrize("overlap", [False, True])
def test_evidence_is_collected_unless_it_is_not_wanted(overlap: bool, tmp_path: Path) -> None:
    model, processor = load_model(save_checkpoint("llava_onevision", tmp_path))
    asked = (model, processor, Clip(frames(), fps=2), "what is in the video", "tome + evs")
    options = {"retain": 0.5, "max_new_tokens": 2, "overlap": overlap, "chunk": 2}
    drawn, bare = (ask(*asked, **options, evidence=wanted) for wanted in (True, False))
    assert {"tome", "evs"} <= {noted.method for noted in drawn.report.items[0].evidence}
    assert not bare.report.items[0].evidence
    assert bare.text == drawn.text and bare.report.visual_after == drawn.report.visual_after


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "llava_next_video", "qwen2_5_vl"])
def test_images_are_answered(family: str, tmp_path: Path) -> None:
    model, processor = load_model(save_checkpoint(family, tmp_path))
    answer = ask(
        model,
        processor,
        Clip(frames(1)),
        "what is in the picture",
        "divprune",
        retain=0.5,
        max_new_tokens=3,
    )
    assert answer.report.items[0].modality == "image"
    assert answer.report.visual_after < answer.report.visual_before


def test_the_answer_is_what_generate_gives_and_streams_whole(onevision) -> None:
    model, processor = onevision
    pieces: list[str] = []
    taken = sample_frames(Clip(frames()), 6)
    answer = ask(
        model, processor, taken, "what is in the video", max_new_tokens=6, on_text=pieces.append
    )
    inputs = prepare(processor, taken, "what is in the video", is_image=False)
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    prompt = inputs["input_ids"].shape[1]
    assert answer.text == processor.tokenizer.decode(ids[0, prompt:], skip_special_tokens=True)
    assert "".join(pieces).strip() == answer.text and len(pieces) > 1
    assert answer.prompt_tokens == prompt and answer.new_tokens == 6
    assert 0 < answer.first_token <= answer.total and answer.tokens_per_second > 0
    assert answer.as_dict()["report"]["visual_before"] == 0


def test_every_stage_of_a_recipe_reaches_the_report(onevision) -> None:
    model, processor = onevision
    answer = ask(
        model,
        processor,
        Clip(frames()),
        "what is in the video",
        "holitom",
        retain=0.5,
        max_new_tokens=2,
    )
    assert [stage.stage for stage in answer.report.stages] == ["projector", "decoder"]


def test_chat_templates_are_used(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}USER: {% for c in m['content'] %}{% if c['type'] == 'video' %}"
        "<video> {% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %} red ASSISTANT:"
    )
    _, processor = load_model(save_checkpoint("llava_onevision", tmp_path, template))
    taken = sample_frames(Clip(frames(2)), 2)
    ids = prepare(processor, taken, "a bike", is_image=False)["input_ids"][0]
    words = processor.tokenizer.convert_ids_to_tokens(ids.tolist())
    assert words[0] == "USER:" and words[-4:] == ["a", "bike", "red", "ASSISTANT:"]
    assert words.count("<video>") == 2 * 9 + 1


def test_stacked_frames_equal_the_image_processor() -> None:
    from transformers import AutoImageProcessor, CLIPImageProcessor

    assert AutoImageProcessor is not None
    settings = square(48)
    pixels = frames(3)
    got = StackedFrames(settings)([pixels])["pixel_values_videos"][0]
    pictures = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in pixels]
    want = CLIPImageProcessor(**settings)(pictures, return_tensors="pt")["pixel_values"]
    assert got.shape == want.shape == (3, 3, 48, 48)
    assert (got - want).abs().max() < 2 / 255 * 2  # values span -1 to 1


@pytest.mark.parametrize("shape", [(40, 64), (17, 90), (200, 120)])
def test_packed_frames_equal_the_image_processor(shape: tuple[int, int]) -> None:
    # An image is a video of the same frame twice, so its processor is the reference.
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    generator = torch.Generator().manual_seed(1)
    frame = torch.randint(0, 256, (3, *shape), generator=generator).byte()
    got = PackedFrames(PACKED_SETTINGS, counts_frames=False)([frame[None].repeat(2, 1, 1, 1)])
    picture = Image.fromarray(frame.permute(1, 2, 0).numpy())
    want = Qwen2VLImageProcessorPil(**PACKED_SETTINGS)([picture], return_tensors="pt")
    assert got["video_grid_thw"].tolist() == np.asarray(want["image_grid_thw"]).tolist()
    assert got["pixel_values_videos"].shape == want["pixel_values"].shape
    assert (got["pixel_values_videos"] - want["pixel_values"]).abs().max() < 2 / 255 * 2


def test_odd_frames_are_filled_up_with_the_last() -> None:
    packed = PackedFrames(PACKED_SETTINGS, counts_frames=False)([frames(5)])
    assert packed["video_grid_thw"][0, 0] == 3
    even = torch.cat([frames(5), frames(5)[-1:]])
    again = PackedFrames(PACKED_SETTINGS, counts_frames=False)([even])
    assert torch.equal(packed["pixel_values_videos"], again["pixel_values_videos"])


@pytest.mark.parametrize("size", [(30, 30), (1080, 1920), (8, 900), (500, 20)])
@pytest.mark.parametrize("count", [1, 16])
def test_fitted_sizes_respect_their_limits(size: tuple[int, int], count: int) -> None:
    low, high = 4 * 28 * 28 * count, 64 * 28 * 28 * count
    height, width = fit_pixels(*size, 28, (low, high), count)
    assert height % 28 == width % 28 == 0
    thin = max(size) / min(size) > 20  # a side of one token cannot shrink any further
    assert low <= count * height * width <= high or thin


def test_families_without_a_stand_in_say_what_to_install() -> None:
    with pytest.raises(UnknownModelError, match="pip install torchvision"):
        NoVideo("SmolVLMProcessor")([frames()])


def test_image_models_refuse_videos(tmp_path: Path) -> None:
    model, processor = load_model(save_checkpoint("llava", tmp_path))
    with pytest.raises(UnknownModelError, match="takes no videos"):
        ask(model, processor, Clip(frames()), "what is in the video")


def test_questions_and_limits_are_checked(onevision) -> None:
    model, processor = onevision
    with pytest.raises(ValueError, match="question is empty"):
        ask(model, processor, Clip(frames()), "  ")
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        ask(model, processor, Clip(frames()), "what", max_new_tokens=0)


def test_checkpoints_that_cannot_answer_are_refused(tmp_path: Path) -> None:
    from tiny import tiny_encoder

    tiny_encoder("dinov2").save_pretrained(tmp_path)
    with pytest.raises(UnknownModelError, match="vision encoder"):
        load_model(tmp_path)
    with pytest.raises(UnknownModelError, match="no such folder"):
        load_model(tmp_path / "missing")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UnknownModelError, match="no adapter"):
        load_model(tmp_path)
