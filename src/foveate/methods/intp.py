"""INTP: more frames than a video LLM was trained on, by stretching what limits them.

Legend: S tokens of one sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from foveate.core import CacheStorage, Card, Method, RuleContext


@dataclass(frozen=True)
class INTP(Method):
    """INTP: a stretched context window and a small cache, so that four times the frames fit.

    The rotary base of the language model becomes `base * s^(d / (d - 2))` with
    `s = max(1, length / window)`, where `length` counts the positions of the prompt as it enters
    the language model, behind whatever the recipe removes before, and `answer` more. It is fixed
    when the prompt is read and kept for as long as its cache lives. Behind every layer the cache is
    stored in `kv_bits` bits. It reduces nothing and takes no budget: "divprune + intp".

    Its third part, frames dealt out to an encoder of fixed length, is `foveate.models.windowed`.

    Args:
        window: positions that the language model was trained on; None: what its configuration says.
        answer: positions held ready behind the prompt.
        kv_bits: 2 or 4; None leaves the cache as it is.
        group: numbers that share a step and a zero point.
        recent: tokens at the end of the cache that stay in full precision.

    Raises:
        ValueError: settings out of range.

    Example:
        >>> import torch
        >>> context = RuleContext(None, position_PS=torch.arange(8064)[None], window=4096)
        >>> INTP().rotary_scale(context)
        2.0

    Source: arXiv 2409.12963.
    """

    card: ClassVar[Card] = Card(
        name="intp",
        title="INTP",
        paper="Interpolating Video-LLMs: Toward Longer-sequence LMMs in a Training-free Manner",
        arxiv="2409.12963",
        year=2024,
        stages=("decoder", "cache"),
        kind="training-free",
        summary="Stretches rotary positions and stores the cache in 2 bits, so that more frames "
        "fit; reduces nothing.",
        defaults={
            "Video-LLaVA-7B, window of 8 frames, 4096 positions": {
                "16 frames": "2 subsequences, 4096 visual tokens",
                "32 frames": "4 subsequences, 8192 visual tokens",
                "64 frames": "8 subsequences, 16384 visual tokens",
            }
        },
        headline=(
            "Video-LLaVA-7B from 8 to 32 frames, accuracy points: MSVD-QA +1.3, MSRVTT-QA +2.2, "
            "ActivityNet-QA +3.6, NExT-QA +2.2, EgoSchema +1.6",
            "32 frames: 4.3 GB of cache in 16 bits, 0.5 GB in 2; 64 frames: 8.6 and 1.1 GB",
        ),
        notes=(
            "Written from the paper; no code is public. One scale per sample, fixed from its real "
            "prompt; group, axes, the full-precision end and the room for the answer are ours.",
            "The rearrangement of frames is for encoders that mix time in a window of fixed "
            "length. Every supported family encodes frame by frame (Qwen-VL pair by pair), where "
            "it is the identity, and the report says so. `foveate.models.windowed` does it for "
            "VideoMAE, ViViT, TimeSformer and V-JEPA 2, or any callable.",
            "With M-RoPE the length is the largest position of any axis, which is far below the "
            "number of tokens. Frequencies scaled before (linear, Llama 3, YaRN) are stretched "
            "further; models that rescale by themselves (dynamic, LongRoPE) are refused.",
            "A later turn on the same cache keeps the scale of the first, because keys and queries "
            "must share it; the report says so where the prompt outgrows it. A text-only first "
            "turn is not stretched.",
            "Every number is rounded to a multiple of its group's step; steps and zero points take "
            "a byte each: 2.25 bits a number, 7.1 times less than 16 bits. The paper builds on a "
            "scheme that spends more bits on salient tokens, which we do not.",
            "The prompt attends to its own keys and values in full precision; later tokens see "
            "the stored ones. Storing restores all keys of a layer for every new token, which "
            "saves memory and costs time.",
            "A budget of 1 switches it off like everything else; none switches it on.",
        ),
        positions="original",
    )
    interleaves_frames: ClassVar[bool] = True

    window: int | None = None
    answer: int = 128
    kv_bits: int | None = 2
    group: int = 64
    recent: int = 128

    def __post_init__(self) -> None:
        if (self.window is not None and self.window < 1) or self.answer < 0:
            raise ValueError(
                f"intp: window must be at least 1 and answer at least 0, got "
                f"window={self.window}, answer={self.answer}."
            )
        self.cache_storage()

    def rotary_scale(self, context: RuleContext) -> float:
        """s of one sample."""
        return max(1.0, (context.num_positions + self.answer) / (self.window or context.window))

    def cache_storage(self) -> CacheStorage | None:
        """2 bits, or None where they are switched off."""
        if self.kv_bits is None:
            return None
        return CacheStorage(self.kv_bits, self.group, self.recent)
