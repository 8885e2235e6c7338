"""Video encoders that see a fixed number of frames at once, given more frames than that.

Legend: B videos, M frames, N frames of the encoder's window, J subsequences, U units of time (one
frame, or as many as the encoder joins in its first layer), P tokens of a unit, D channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from foveate.ops import interleave


@dataclass(frozen=True)
class FixedWindow:
    """What an encoder of fixed length takes and gives.

    Args:
        frames: N.
        tubelet: frames that its first layer joins; they stay neighbours.
        num_prefix: tokens before those of the video, such as [CLS].
        patch_major: its tokens are sorted by place, then time.

    Raises:
        ValueError: the window does not hold a whole number of tubelets.

    Example:
        >>> FixedWindow(16, tubelet=2).units
        8
    """

    frames: int
    tubelet: int = 1
    num_prefix: int = 0
    patch_major: bool = False

    def __post_init__(self) -> None:
        if self.frames < 1 or self.tubelet < 1 or self.frames % self.tubelet:
            raise ValueError(
                f"A window holds whole tubelets, got {self.frames} frames in tubelets of "
                f"{self.tubelet}."
            )

    @property
    def units(self) -> int:
        """Units of time in a window."""
        return self.frames // self.tubelet


def fixed_window(encoder: Any) -> FixedWindow | None:
    """The window of a transformers video encoder; None: it works frame by frame.

    Known are VideoMAE, ViViT, TimeSformer and V-JEPA 2. The encoders of every model family that
    `foveate.reduce` takes work frame by frame.

    Example:
        >>> from transformers import VideoMAEConfig, VideoMAEModel
        >>> config = VideoMAEConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        ...                         intermediate_size=8, image_size=16, num_frames=4)
        >>> fixed_window(VideoMAEModel(config))
        FixedWindow(frames=4, tubelet=2, num_prefix=0, patch_major=False)
    """
    config = getattr(encoder, "config", None)
    kind = getattr(config, "model_type", "")
    if config is None or kind not in ("videomae", "vivit", "timesformer", "vjepa2"):
        return None
    if kind == "vjepa2":
        return FixedWindow(config.frames_per_clip, config.tubelet_size)
    if kind == "videomae":
        return FixedWindow(config.num_frames, config.tubelet_size)
    if kind == "vivit":
        return FixedWindow(config.num_frames, config.tubelet_size[0], num_prefix=1)
    if config.attention_type == "space_only":
        raise ValueError(
            "This TimeSformer attends in space only: its frames are independent, so it needs no "
            "window, and its output mixes them in none."
        )
    return FixedWindow(config.num_frames, num_prefix=1, patch_major=True)


def windowed(
    encoder: Callable[..., Any],
    frames_BMCHW: torch.Tensor,
    window: FixedWindow | int | None = None,
) -> torch.Tensor:
    """Features of any number of frames from an encoder trained on a fixed number.

    The frames are dealt out to ceil(M / N) subsequences with a stride, so that each spans the whole
    video as the encoder's input always did; they are encoded as one batch and put back in order of
    time. A subsequence that comes out short repeats its last frame, and what came of the repetition
    is dropped. With an encoder that works frame by frame this is the identity, and it is called on
    all frames at once. Cost: the encoder's, ceil(M / N) times.

    Args:
        encoder: a transformers encoder, or anything that takes [B, N, C, H, W] and gives tokens
            [B, prefix + N / tubelet * P, D] or an output with `last_hidden_state`. One that works
            frame by frame takes [B, C, H, W] and gives [B, P, D].
        frames_BMCHW: frames as the encoder takes them.
        window: a number of frames, or more about the encoder; None: what `fixed_window` says.

    Returns:
        [B, U, P, D] in order of time, without prefix tokens where there is a window; U is M, or
        ceil(M / tubelet) where the encoder joins frames.

    Raises:
        ValueError: frames or features of another shape.

    Example:
        >>> def mean_of_all(frames_BNCHW):
        ...     mean_BD = frames_BNCHW.mean((1, 3, 4))
        ...     return mean_BD[:, None].expand(-1, frames_BNCHW.shape[1], -1)
        >>> frames = torch.arange(6.0).view(1, 6, 1, 1, 1)
        >>> windowed(mean_of_all, frames, window=3).flatten().tolist()
        [2.0, 3.0, 2.0, 3.0, 2.0, 3.0]

    Source: Interpolating Video-LLMs, arXiv 2409.12963 (video token rearrangement).
    """
    if frames_BMCHW.dim() != 5 or frames_BMCHW.shape[1] < 1:
        raise ValueError(
            f"Frames must be [videos, frames, channels, height, width], got "
            f"{tuple(frames_BMCHW.shape)}."
        )
    if window is None:
        window = fixed_window(encoder)
    elif isinstance(window, int):
        window = FixedWindow(window)
    batch, num_frames = frames_BMCHW.shape[:2]
    if window is None:
        x_KPD = _features(encoder, frames_BMCHW.flatten(0, 1))
        return x_KPD.unflatten(0, (batch, num_frames))
    missing = -num_frames % window.tubelet
    if missing:
        last = frames_BMCHW[:, -1:].expand(-1, missing, -1, -1, -1)
        frames_BMCHW = torch.cat([frames_BMCHW, last], dim=1)
    x_BUTCHW = frames_BMCHW.unflatten(1, (-1, window.tubelet))
    index_JN, inverse_U = interleave(x_BUTCHW.shape[1], window.units)
    device = frames_BMCHW.device
    # [B, J, units, tubelet, C, H, W] -> one batch of B * J windows
    dealt = x_BUTCHW[:, index_JN.to(device)].flatten(2, 3).flatten(0, 1)
    x_KLD = _features(encoder, dealt)[:, window.num_prefix :]
    if x_KLD.shape[0] != dealt.shape[0] or x_KLD.shape[1] % window.units:
        raise ValueError(
            f"The encoder gave features {tuple(x_KLD.shape)} behind {window.num_prefix} prefix "
            f"tokens for {dealt.shape[0]} windows of {window.units} units of time: the tokens of a "
            "window must divide evenly into them."
        )
    if window.patch_major:
        x_KNPD = x_KLD.unflatten(1, (-1, window.units)).transpose(1, 2)
    else:
        x_KNPD = x_KLD.unflatten(1, (window.units, -1))
    x_BLPD = x_KNPD.unflatten(0, (batch, -1)).flatten(1, 2)
    return x_BLPD[:, inverse_U.to(device)]


def _features(encoder: Callable[..., Any], frames: torch.Tensor) -> torch.Tensor:
    kind = getattr(getattr(encoder, "config", None), "model_type", "")
    # Its predictor, a training device, would run along otherwise.
    out = encoder(frames, skip_predictor=True) if kind == "vjepa2" else encoder(frames)
    x = out if isinstance(out, torch.Tensor) else getattr(out, "last_hidden_state", None)
    if not isinstance(x, torch.Tensor) or x.dim() != 3:
        found = type(out).__name__ if x is None else tuple(x.shape)
        raise ValueError(f"The encoder must give features [batch, tokens, channels], got {found}.")
    return x
