"""Preprocessing equals the PIL image processors of transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from foveate.video import Clip, FrameTransform
from foveate.video.resize import resize

FILTERS = ["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]


def pil_processors():
    """Names and configurations; each class has a PIL form that needs no torchvision."""
    return {
        "CLIPImageProcessor": [{}, {"crop_size": {"height": 300, "width": 500}}],
        "SiglipImageProcessor": [{}, {"size": {"height": 384, "width": 384}}],
        "BitImageProcessor": [
            {"size": {"shortest_edge": 256}},
            {"size": {"shortest_edge": 518}, "crop_size": {"height": 518, "width": 518}},
            {"size": {"shortest_edge": 200, "longest_edge": 300}, "do_center_crop": False},
        ],
        "ViTImageProcessor": [{}, {"resample": 1}, {"do_rescale": False, "do_normalize": False}],
    }


def make(name, settings):
    import transformers

    cls = getattr(transformers, name + "Pil", None)
    if cls is None:
        pytest.skip(f"this transformers has no PIL form of {name}")
    return cls(**settings)


@pytest.mark.parametrize(
    ("name", "settings"), [(n, s) for n, many in pil_processors().items() for s in many]
)
@pytest.mark.parametrize("turned", [False, True])
def test_equals_the_processor_on_real_frames(name, settings, turned, real_clip):
    processor = make(name, settings)
    frames = Clip(real_clip("bikes")).sample(3).pixels
    if turned:
        frames = frames.transpose(-2, -1).contiguous()
    images = [Image.fromarray(f.permute(1, 2, 0).numpy()) for f in frames]
    expected = torch.from_numpy(np.stack(processor(images)["pixel_values"])).float()
    transform = FrameTransform.from_processor(processor)
    got = transform(frames)
    assert got.dtype == torch.float32
    assert got.shape == expected.shape
    assert tuple(got.shape[-2:]) == transform.output_size(*frames.shape[-2:])
    std = torch.tensor(transform.std or (1.0,) * 3).view(3, 1, 1)
    unit = 1.0 if transform.rescale_factor is not None else 255.0
    assert ((got - expected) * std).abs().max() <= 2 / 255 * unit
    # In fact resizing is exact, and only float32 rounding is left.
    torch.testing.assert_close(got, expected, atol=1e-5 * unit, rtol=1e-5)


def test_configuration_file_form(real_clip):
    processor = make("CLIPImageProcessor", {})
    frames = Clip(real_clip("carphone")).sample(2).pixels
    from_dict = FrameTransform.from_processor(processor.to_dict())
    assert from_dict == FrameTransform.from_processor(processor)
    assert torch.equal(from_dict(frames), FrameTransform.from_processor(processor)(frames))


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize(
    ("source", "target"),
    [((37, 53), (20, 31)), ((30, 30), (64, 91)), ((5, 7), (1, 1)), ((1, 1), (4, 3)),
     ((90, 17), (21, 16)), ((40, 90), (40, 33)), ((90, 40), (33, 40)), ((20, 20), (20, 20)),
     ((140, 60), (62, 70))],
)  # fmt: skip
def test_resize_equals_pillow(name, source, target):
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (*source, 3), dtype=np.uint8)
    picture[: source[0] // 2] = (picture[: source[0] // 2] > 128) * 255  # overshoot is clipped
    expected = Image.fromarray(picture).resize(target[::-1], Image.Resampling[name.upper()])
    got = resize(torch.from_numpy(picture).permute(2, 0, 1), target, name)
    np.testing.assert_array_equal(got.permute(1, 2, 0).numpy(), np.asarray(expected))


def test_batches_equal_single_pictures():
    pixels = torch.randint(0, 256, (70, 3, 120, 160), dtype=torch.uint8)
    together = resize(pixels, (56, 64))
    assert torch.equal(together[40:41], resize(pixels[40:41], (56, 64)))
    assert torch.equal(together[69, 2], resize(pixels[69, 2], (56, 64)))
    assert resize(pixels.transpose(-2, -1), (64, 56)).shape == (70, 3, 64, 56)


def test_half_precision_and_no_frames():
    transform = FrameTransform(size=14, mean=(0.5,) * 3, std=(0.5,) * 3)
    pixels = torch.randint(0, 256, (2, 3, 20, 30), dtype=torch.uint8)
    assert transform(pixels, dtype=torch.bfloat16).dtype == torch.bfloat16
    torch.testing.assert_close(
        transform(pixels, dtype=torch.float16).float(), transform(pixels), atol=1e-3, rtol=1e-3
    )
    assert transform(pixels[:0]).shape == (0, 3, 14, 14)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (24, (24, 24)),
        ({"height": 10, "width": 20}, (10, 20)),
        ({"shortest_edge": 24}, (24, 56)),
        ({"shortest_edge": 24, "longest_edge": 40}, (17, 40)),
        ({"max_height": 100, "max_width": 32}, (13, 32)),
        (None, (27, 64)),
    ],
)
def test_size_forms(size, expected):
    transform = FrameTransform(size=size)
    assert transform.output_size(27, 64) == expected
    assert transform(torch.zeros(1, 3, 27, 64, dtype=torch.uint8)).shape[-2:] == expected


def test_size_forms_agree_with_transformers():
    from transformers.image_transforms import get_size_with_aspect_ratio

    rng = np.random.default_rng(0)
    for height, width, edge, cap in rng.integers(8, 400, (500, 4)).tolist():
        cap = max(edge, cap)
        transform = FrameTransform(size={"shortest_edge": edge, "longest_edge": cap})
        assert transform.output_size(height, width) == get_size_with_aspect_ratio(
            (height, width), edge, cap
        )


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"do_resize": True, "size": {"shortest_edge": 3136}, "min_pixels": 3136}, "min_pixels"),
        ({"do_resize": True, "size": {"longest_side": 20}}, "longest_side"),
        ({"do_pad": True}, "do_pad"),
        ({"do_resize": True, "size": 0}, "at least 1"),
        ({"do_resize": True, "size": 8, "resample": 9}, "resample"),
    ],
)
def test_configurations_that_cannot_be_followed(config, words):
    with pytest.raises(ValueError, match=words):
        FrameTransform.from_processor(config)


def test_bad_frames():
    transform = FrameTransform(size=8)
    for bad in (
        torch.zeros(2, 3, 8, 8),
        torch.zeros(3, 8, 8, dtype=torch.uint8),
        torch.zeros(2, 8, 8, 3, dtype=torch.uint8),
    ):
        with pytest.raises(ValueError, match=r"uint8 \[T, 3, H, W\]"):
            transform(bad)
    with pytest.raises(ValueError, match="go together"):
        FrameTransform(mean=(0.5,) * 3)
    with pytest.raises(ValueError, match="uint8"):
        resize(torch.zeros(3, 4, 4), (2, 2))
    with pytest.raises(ValueError, match="at least"):
        resize(torch.zeros(3, 4, 4, dtype=torch.uint8), (0, 2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_same_on_a_gpu():
    transform = FrameTransform(size=56, mean=(0.5,) * 3, std=(0.5,) * 3)
    pixels = torch.randint(0, 256, (2, 3, 120, 160), dtype=torch.uint8)
    torch.testing.assert_close(transform(pixels.cuda()).cpu(), transform(pixels))
