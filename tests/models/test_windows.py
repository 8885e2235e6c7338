"""Frames dealt out to encoders of fixed length, and put back in order of time."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    TimesformerConfig,
    TimesformerModel,
    VideoMAEConfig,
    VideoMAEModel,
    VivitConfig,
    VivitModel,
    VJEPA2Config,
    VJEPA2Model,
)

from foveate.models import FixedWindow, fixed_window, windowed
from foveate.models.registry import list_families
from foveate.ops import interleave
from tiny import randomize, tiny_encoder, tiny_model

SMALL = {
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 8,
    "patch_size": 4,
}


def video(frames: int, batch: int = 2, size: int = 8) -> torch.Tensor:
    return torch.randn(batch, frames, 3, size, size, generator=torch.Generator().manual_seed(0))


def temporal(kind: str) -> tuple[torch.nn.Module, FixedWindow]:
    if kind == "videomae":
        model = VideoMAEModel(VideoMAEConfig(**SMALL, num_frames=8, tubelet_size=2))
        window = FixedWindow(8, tubelet=2)
    elif kind == "vivit":
        model = VivitModel(VivitConfig(**SMALL, num_frames=4, tubelet_size=[2, 4, 4]))
        window = FixedWindow(4, tubelet=2, num_prefix=1)
    elif kind == "timesformer":
        model = TimesformerModel(TimesformerConfig(**SMALL, num_frames=4))
        window = FixedWindow(4, num_prefix=1, patch_major=True)
    else:
        sizes = {key: value for key, value in SMALL.items() if key != "intermediate_size"}
        sizes |= {"image_size": 8, "crop_size": 8, "pred_hidden_size": 12}
        sizes |= {"pred_num_attention_heads": 2, "pred_num_hidden_layers": 1}
        model = VJEPA2Model(VJEPA2Config(**sizes, frames_per_clip=4, tubelet_size=2))
        window = FixedWindow(4, tubelet=2)
    return randomize(model, 0).eval(), window


TEMPORAL = ("videomae", "vivit", "timesformer", "vjepa2")


def per_frame(frames_BNCHW: torch.Tensor) -> torch.Tensor:
    """Two tokens a frame, from that frame alone."""
    low_BNC, high_BNC = frames_BNCHW.amin((-1, -2)), frames_BNCHW.amax((-1, -2))
    return torch.stack([low_BNC, high_BNC], dim=2).flatten(1, 2)


def mean_of_all(frames_BNCHW: torch.Tensor) -> torch.Tensor:
    return frames_BNCHW.mean((1, 3, 4))[:, None].expand(-1, frames_BNCHW.shape[1], -1)


@pytest.mark.parametrize("num", [1, 5, 8, 9, 16, 23, 32])
@pytest.mark.parametrize("window", [1, 3, 8])
def test_frames_are_dealt_with_a_stride_and_come_back(num, window):
    index_JN, inverse_M = interleave(num, window)
    count = -(-num // window)
    assert index_JN.shape == (count, window)
    assert index_JN.flatten()[inverse_M].tolist() == list(range(num))
    for j, row in enumerate(index_JN.tolist()):
        mine = list(range(j, num, count))
        assert row == mine + [mine[-1]] * (window - len(mine))


def test_the_headline_setting():
    """32 frames for an encoder of 8: subsequence j is 0 + j, 4 + j, ..., 28 + j."""
    index_JN, inverse_M = interleave(32, 8)
    assert index_JN.tolist() == [[j + 4 * i for i in range(8)] for j in range(4)]
    assert inverse_M.tolist() == [(i % 4) * 8 + i // 4 for i in range(32)]


@pytest.mark.parametrize("num", [1, 4, 8, 10, 24])
def test_an_encoder_of_single_frames_gives_the_same_bits(num):
    frames = video(num)
    expected = per_frame(frames).unflatten(1, (num, 2))
    assert torch.equal(windowed(per_frame, frames, window=8), expected)


@pytest.mark.parametrize(("num", "window"), [(12, 4), (32, 8), (6, 3)])
def test_an_averaging_encoder_gives_means_of_congruent_frames(num, window):
    frames = video(num)
    count = num // window
    out_BMPD = windowed(mean_of_all, frames, window=window)
    assert out_BMPD.shape == (2, num, 1, 3)
    for i in range(num):
        expected = frames[:, i % count :: count].mean((1, 3, 4))
        torch.testing.assert_close(out_BMPD[:, i, 0], expected, atol=1e-6, rtol=0)


def test_short_subsequences_repeat_their_last_frame():
    frames = torch.arange(5.0).view(1, 5, 1, 1, 1)
    out = windowed(mean_of_all, frames, window=3)[0, :, 0, 0].tolist()
    # 0 2 4 and 1 3 3
    assert out == pytest.approx([2.0, 7 / 3, 2.0, 7 / 3, 2.0])


@pytest.mark.parametrize("kind", TEMPORAL)
def test_one_window_is_what_the_encoder_does(kind):
    model, window = temporal(kind)
    assert fixed_window(model) == window
    frames = video(window.frames)
    with torch.no_grad():
        given = {"skip_predictor": True} if kind == "vjepa2" else {}
        plain = model(frames, **given).last_hidden_state[:, window.num_prefix :]
        out_BUPD = windowed(model, frames)
    assert out_BUPD.shape == (2, window.units, 4, 12)
    if window.patch_major:
        out_BUPD = out_BUPD.transpose(1, 2)
    assert torch.equal(out_BUPD.flatten(1, 2), plain)


@pytest.mark.parametrize("kind", TEMPORAL)
def test_several_windows_are_their_subsequences(kind):
    model, window = temporal(kind)
    frames = video(3 * window.frames - window.tubelet - 1)
    with torch.no_grad():
        out_BUPD = windowed(model, frames)
    units = -(-frames.shape[1] // window.tubelet)
    assert out_BUPD.shape == (2, units, 4, 12)
    number = torch.arange(units * window.tubelet).clamp(max=frames.shape[1] - 1)
    for j in range(3):
        mine = list(range(j, units, 3))
        taken = mine + [mine[-1]] * (window.units - len(mine))
        part = frames[:, number.view(units, -1)[taken].flatten()]
        with torch.no_grad():
            alone = windowed(model, part)[:, : len(mine)]
        torch.testing.assert_close(out_BUPD[:, j::3], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", TEMPORAL)
def test_these_encoders_do_mix_time(kind):
    """The reason for all this: the arrangement is no identity here."""
    model, window = temporal(kind)
    frames = video(window.frames)
    other = frames.clone()
    other[:, -1] += 3
    with torch.no_grad():
        change = (windowed(model, other) - windowed(model, frames)).abs()
    assert (change[:, 0] > 1e-3).any()


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2", "vit"])
def test_image_encoders_are_left_as_they_are(kind):
    model = tiny_encoder(kind)
    frames = video(5, batch=1, size=48)
    assert fixed_window(model) is None
    with torch.no_grad():
        expected = model(frames[0]).last_hidden_state
        assert torch.equal(windowed(model, frames)[0], expected)


def test_no_supported_family_has_a_window():
    for family in ("llava_onevision", "video_llava", "qwen2_vl", "video_llama_3"):
        assert family in list_families()
        model = tiny_model(family)
        assert not any(fixed_window(module) for module in model.modules())


def test_an_event_between_uniform_frames_reaches_its_place():
    """Frame 13 of 32 is not among 8 uniform ones; its features stand at place 13."""
    frames = torch.zeros(1, 32, 1, 1, 1)
    frames[:, 13] = 1
    assert 13 not in torch.arange(8) * 4 + 2

    def shows(frames_BNCHW: torch.Tensor) -> torch.Tensor:
        own = frames_BNCHW.flatten(2)
        return torch.cat([own, own.mean(1, keepdim=True).expand_as(own)], dim=-1)

    out_MD = windowed(shows, frames, window=8)[0, :, 0]
    assert out_MD[:, 0].nonzero()[:, 0].tolist() == [13]
    assert out_MD[:, 1].nonzero()[:, 0].tolist() == list(range(1, 32, 4))


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        interleave(0, 4)
    with pytest.raises(ValueError, match="whole tubelets"):
        FixedWindow(5, tubelet=2)
    with pytest.raises(ValueError, match=r"\[videos, frames"):
        windowed(per_frame, torch.zeros(3, 4, 5))
    with pytest.raises(ValueError, match="divide evenly"):
        windowed(lambda x: x.flatten(1)[:, :7, None], video(8), window=4)
    with pytest.raises(ValueError, match=r"\[batch, tokens, channels\]"):
        windowed(lambda x: x, video(8), window=4)
    config = TimesformerConfig(**SMALL, num_frames=4, attention_type="space_only")
    with pytest.raises(ValueError, match="space only"):
        fixed_window(TimesformerModel(config))
