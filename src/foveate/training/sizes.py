"""Sizes of the embedded video LLM: the same code and data at three scales."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Attributes:
        steps: optimiser steps.
        clips: clips per step.
        rate: peak learning rate; linear warm-up, then a cosine down to a twentieth.
        warmup: steps of the warm-up.
        horizon: steps after which the cosine would end; None: `steps`. A stage that another one
            goes on from stops while its rate is still high.
    """

    steps: int
    clips: int
    rate: float
    warmup: int = 100
    horizon: int | None = None


@dataclass(frozen=True)
class Size:
    """One size of the model and how long it trains.

    Attributes:
        name: as on the command line.
        image: side of a frame in pixels.
        patch: side of a patch in pixels; (image / patch)^2 patches become a quarter as many tokens.
        frames: per clip.
        vision: width, layers, heads and MLP width of the vision tower.
        text: width, layers, heads, key-value heads and MLP width of the language model.
        tower: training of the tower on per-patch labels of single frames.
        answers: training of the language model on questions, the tower frozen.
        joint: training of everything on both.
        frames_per_clip: frames of each clip that the tower stage looks at.
        natural: fraction of shots before natural pictures.
        dtype: in which the finished weights are stored.
    """

    name: str
    image: int
    patch: int
    frames: int
    vision: tuple[int, int, int, int]
    text: tuple[int, int, int, int, int]
    tower: Stage
    answers: Stage
    joint: Stage
    frames_per_clip: int = 4
    natural: float = 0.3
    dtype: str = "float32"

    @property
    def tokens_per_frame(self) -> int:
        """Visual tokens of a frame in the language model."""
        side = self.image // self.patch
        return ((side + 1) // 2) ** 2

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of a clip in the language model, the closing one included."""
        return self.frames * self.tokens_per_frame + 1

    def as_dict(self) -> dict[str, Any]:
        """As plain data, for checkpoints and model cards: what JSON gives back."""
        plain = asdict(self)
        return {name: list(x) if isinstance(x, tuple) else x for name, x in plain.items()}


SIZES: dict[str, Size] = {
    # For tests: learns within seconds, answers nothing.
    "tiny": Size(
        name="tiny",
        image=32,
        patch=8,
        frames=4,
        vision=(32, 1, 2, 64),
        text=(32, 2, 2, 1, 64),
        tower=Stage(6, 4, 2e-3, 2),
        answers=Stage(8, 4, 2e-3, 2),
        joint=Stage(4, 4, 1e-3, 2),
        frames_per_clip=2,
        natural=0.0,
    ),
    # For two CPU cores: 257 visual tokens a clip, 3 million parameters.
    "small": Size(
        name="small",
        image=64,
        patch=8,
        frames=16,
        vision=(128, 4, 4, 512),
        text=(192, 5, 6, 3, 512),
        tower=Stage(1000, 64, 3e-3),
        answers=Stage(1800, 8, 1.5e-3, 200, horizon=4000),
        joint=Stage(1700, 8, 1e-3, 50),
        dtype="bfloat16",
    ),
    # For one data-centre GPU: 785 visual tokens a clip, 10 million parameters.
    "base": Size(
        name="base",
        image=112,
        patch=8,
        frames=16,
        vision=(192, 6, 6, 768),
        text=(320, 6, 10, 5, 864),
        tower=Stage(4000, 128, 1e-3, 200),
        answers=Stage(5000, 64, 1e-3, 400, horizon=12000),
        joint=Stage(9000, 64, 8e-4, 200),
        dtype="bfloat16",
    ),
}


def size_named(name: str) -> Size:
    """The size with this name.

    Raises:
        ValueError: there is none.
    """
    if name not in SIZES:
        raise ValueError(f"unknown size {name!r}; choose one of {', '.join(SIZES)}.")
    return SIZES[name]
