"""Short clips of moving shapes with captions, drawn by arithmetic on whole batches.

Legend: B clips, F frames of each, O objects of one, K objects of all, H, W pixels, L words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from foveate.training.task import numbers_of
from foveate.world.vocabulary import COLORS, REGIONS, SHAPES

#: Frames of a clip.
FRAMES = 12
#: Side of a frame in pixels.
SIDE = 60
#: Standard deviations, in levels of 256, of the ground's grain, which stays from frame to frame,
#: and of the noise of every frame.
_GRAIN, _NOISE = 8.0, 2.0
#: Most objects of a clip.
OBJECTS = 3
PLACES = tuple(place for row in REGIONS for place in row)
PAD, END, START = 0, 1, 2
#: Words by number.
VOCABULARY = (
    *("<pad>", "<end>", "<start>"),
    *("a", "an", "the", "stays", "moves", "at", "between", "and", "."),
    *COLORS,
    *SHAPES,
    *PLACES,
)
_NUMBER = {word: number for number, word in enumerate(VOCABULARY)}
_RGB = np.array(list(COLORS.values()), np.float32)
#: Of the object of every colour: its shape and its places.
COLOR_FACTS = len(COLORS) * (len(SHAPES) + len(PLACES))
#: Of the longest caption: three moving objects of eleven words, start and end.
MAX_WORDS = 11 * OBJECTS + 2


@dataclass(frozen=True)
class Clips:
    """What B clips show.

    Attributes:
        there_BO: whether there is an object.
        color_BO: index in `COLORS`, another one for each object of a clip.
        shape_BO: index in `SHAPES`.
        moves_BO: whether the object moves.
        places_BO2: indices in `PLACES` where it starts and ends; the same if it stays.
        centre_BO22: these places in pixels, (x, y), each a little beside the middle of its region.
        radius_BO: in pixels.
        ground_B23: colours of the background, at the top and at the bottom.
    """

    there_BO: np.ndarray
    color_BO: np.ndarray
    shape_BO: np.ndarray
    moves_BO: np.ndarray
    places_BO2: np.ndarray
    centre_BO22: np.ndarray
    radius_BO: np.ndarray
    ground_B23: np.ndarray


def sample_clips(rng: np.random.Generator, num: int) -> Clips:
    """Draw clips of two or three objects, each of a colour of its own; half of them move.

    Example:
        >>> clips = sample_clips(np.random.default_rng(0), 4)
        >>> bool((clips.there_BO.sum(1) >= 2).all()), clips.centre_BO22.shape
        (True, (4, 3, 2, 2))
    """
    there_BO = np.arange(OBJECTS) < rng.integers(2, OBJECTS + 1, (num, 1))
    color_BO = rng.random((num, len(COLORS))).argsort(1)[:, :OBJECTS]
    shape_BO = rng.integers(0, len(SHAPES), (num, OBJECTS))
    moves_BO = rng.random((num, OBJECTS)) < 0.5
    # Places of one clip are all different, so objects hide each other in passing only.
    order_BP = rng.random((num, len(PLACES))).argsort(1)
    start_BO, end_BO = order_BP[:, :OBJECTS], order_BP[:, OBJECTS : 2 * OBJECTS]
    places_BO2 = np.stack([start_BO, np.where(moves_BO, end_BO, start_BO)], -1)
    cell = SIDE / 3
    beside_BO12 = rng.uniform(-0.1, 0.1, (num, OBJECTS, 1, 2)) * cell
    middle_BO22 = (np.stack([places_BO2 % 3, places_BO2 // 3], -1) + 0.5) * cell
    return Clips(
        there_BO,
        color_BO,
        shape_BO,
        moves_BO,
        places_BO2,
        (middle_BO22 + beside_BO12).astype(np.float32),
        rng.uniform(0.29, 0.36, (num, OBJECTS)).astype(np.float32) * cell,
        rng.uniform(40, 130, (num, 2, 1)).astype(np.float32)
        + rng.uniform(-20, 20, (num, 2, 3)).astype(np.float32),
    )


def render_clips(clips: Clips, frame_BF: np.ndarray, rng: np.random.Generator) -> Tensor:
    """The frames of clips, uint8 [B, F, 3, 60, 60], with noise; O(B F O H W).

    Args:
        clips: from `sample_clips`.
        frame_BF: numbers of the frames that are drawn, of `FRAMES`.
        rng: of the noise.
    """
    part_B1F1 = (frame_BF / (FRAMES - 1)).astype(np.float32)[:, None, :, None]
    first_BO12, last_BO12 = clips.centre_BO22[:, :, :1], clips.centre_BO22[:, :, 1:]
    centre_BOF2 = first_BO12 + (last_BO12 - first_BO12) * part_B1F1
    mask_BOFHW = _masks(clips, centre_BOF2)
    down_H1 = np.linspace(0, 1, SIDE, dtype=np.float32)[:, None]
    top_B131, bottom_B131 = clips.ground_B23[:, :1, :, None], clips.ground_B23[:, 1:, :, None]
    ground_B3H1 = top_B131.transpose(0, 2, 1, 3) * (1 - down_H1)
    ground_B3H1 = ground_B3H1 + bottom_B131.transpose(0, 2, 1, 3) * down_H1
    B, F = frame_BF.shape
    grain_B3HW = rng.standard_normal((B, 3, SIDE, SIDE), dtype=np.float32) * _GRAIN
    x_BF3HW = rng.standard_normal((B, F, 3, SIDE, SIDE), dtype=np.float32) * _NOISE
    x_BF3HW += (ground_B3H1 + grain_B3HW)[:, None]
    for number in range(OBJECTS):
        mask_BF1HW = mask_BOFHW[:, number, :, None]
        x_BF3HW += mask_BF1HW * (_RGB[clips.color_BO[:, number], None, :, None, None] - x_BF3HW)
    return torch.from_numpy(x_BF3HW.clip(0, 255).astype(np.uint8))


def _masks(clips: Clips, centre_BOF2: np.ndarray) -> np.ndarray:
    """How much of each pixel an object covers, float32 [B, O, F, H, W]."""
    pixel_W = np.arange(SIDE, dtype=np.float32) + 0.5
    radius_BO11 = clips.radius_BO[:, :, None, None]
    u_BOFW = (pixel_W - centre_BOF2[..., 0, None]) / radius_BO11
    v_BOFH = (pixel_W - centre_BOF2[..., 1, None]) / radius_BO11
    mask_BOFHW = np.zeros((*centre_BOF2.shape[:3], SIDE, SIDE), np.float32)
    for number, name in enumerate(SHAPES):
        chosen_BO = clips.there_BO & (clips.shape_BO == number)
        u_KF1W, v_KFH1 = u_BOFW[chosen_BO][:, :, None], v_BOFH[chosen_BO][..., None]
        outside_KFHW = (
            _DISTANCES[name](u_KF1W, v_KFH1) * clips.radius_BO[chosen_BO, None, None, None]
        )
        mask_BOFHW[chosen_BO] = np.clip(0.5 - outside_KFHW, 0, 1)
    return mask_BOFHW


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(v - 0.8, (np.abs(u) - 0.6 * (v + 1)) * 0.86)


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u, v = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(u - 0.32, v - 1), np.maximum(v - 0.32, u - 1))


def _heart(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    lobes = np.hypot(np.abs(u) - 0.48, v + 0.35) - 0.52
    point = np.maximum(-0.3 - v, (np.abs(u) + 0.82 * (v + 0.1) - 0.93) * 0.77)
    return np.minimum(lobes, point)


#: Signed distance from the outline (roughly), in radii, right and down of the centre.
_DISTANCES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda u, v: np.hypot(u, v) - 1,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.86,
    "triangle": _triangle,
    "diamond": lambda u, v: (np.abs(u) + np.abs(v) - 1.1) * 0.71,
    "cross": _cross,
    "star": lambda u, v: (np.hypot(u, v) - 0.68 - 0.32 * np.cos(5 * np.arctan2(u, -v))) * 0.6,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.75) - 0.25,
    "heart": _heart,
}


def captions_of(clips: Clips) -> list[str]:
    """What clips show, one sentence an object, in the order of `COLORS`.

    The two places of a moving object come in the order of `PLACES`: which of them it leaves and
    which it reaches cannot be told from frames in any order, and so is not asked for.

    Example:
        >>> captions_of(sample_clips(np.random.default_rng(0), 1))[0].split()[-1]
        '.'
    """
    colors = tuple(COLORS)
    order_BO = clips.color_BO.argsort(1)
    found = []
    for clip, order_O in enumerate(order_BO):
        sentences = []
        for o in order_O[clips.there_BO[clip, order_O]]:
            color = colors[clips.color_BO[clip, o]]
            article = "an" if color[0] in "aeiou" else "a"
            first, second = sorted(clips.places_BO2[clip, o])
            does = f"moves between the {PLACES[first]} and the {PLACES[second]}"
            if first == second:
                does = f"stays at the {PLACES[first]}"
            sentences.append(f"{article} {color} {SHAPES[clips.shape_BO[clip, o]]} {does} .")
        found.append(" ".join(sentences))
    return found


def objects_of(clips: Clips) -> Tensor:
    """Shapes and places of the object of every colour, bool [B, colours, shapes + places].

    Example:
        >>> objects_of(sample_clips(np.random.default_rng(0), 2)).shape
        torch.Size([2, 8, 17])
    """
    objects = np.zeros((len(clips.there_BO), len(COLORS), len(SHAPES) + len(PLACES)), bool)
    clip_K, object_K = clips.there_BO.nonzero()
    color_K = clips.color_BO[clip_K, object_K]
    objects[clip_K, color_K, clips.shape_BO[clip_K, object_K]] = True
    for end in range(2):
        objects[clip_K, color_K, len(SHAPES) + clips.places_BO2[clip_K, object_K, end]] = True
    return torch.from_numpy(objects)


def tokenize(captions: Sequence[str]) -> Tensor:
    """Captions as words by number, int64 [B, 35]: start, words, end, padding.

    Raises:
        ValueError: a word is not in `VOCABULARY`, or there are too many.

    Example:
        >>> tokenize(["a red star stays at the top ."])[0, :10].tolist()[-1] == END
        True
    """
    rows = np.full((len(captions), MAX_WORDS), PAD, np.int64)
    for row, caption in zip(rows, captions, strict=True):
        words = caption.lower().split()
        unknown = [word for word in words if word not in _NUMBER]
        if unknown:
            raise ValueError(
                f"the caption {caption!r} has words that are not known: {', '.join(unknown)}. "
                f"Known ones are {', '.join(VOCABULARY[3:])}; separate all of them by spaces."
            )
        if len(words) > MAX_WORDS - 2:
            raise ValueError(f"a caption has at most {MAX_WORDS - 2} words, got {len(words)}.")
        row[: len(words) + 2] = [START, *(_NUMBER[word] for word in words), END]
    return torch.from_numpy(rows)


def make_clips(
    seed: Sequence[int], num: int, frames: int = FRAMES, together: int = 1
) -> dict[str, Tensor]:
    """Clips with captions that follow from the seed alone.

    Args:
        seed: numbers of the stream.
        num: of clips.
        frames: of each: all of them in order, or so many that are drawn at random.
        together: frames in a row that are drawn together, as one segment of a clip; divides both.

    Returns:
        "pixels" uint8 [B, F, 3, 60, 60], "words" int64 [B, 35] and "objects" as `objects_of`.

    Example:
        >>> batch = make_clips((0, 1), 2, frames=1)
        >>> tuple(batch["pixels"].shape), tuple(batch["words"].shape)
        ((2, 1, 3, 60, 60), (2, 35))
    """
    rng = numbers_of(*seed)
    clips = sample_clips(rng, num)
    frame_BF = np.broadcast_to(np.arange(FRAMES), (num, FRAMES))
    if frames < FRAMES:
        order_BS = rng.random((num, FRAMES // together)).argsort(1)
        drawn_BS1 = np.sort(order_BS[:, : frames // together], 1)[..., None]
        frame_BF = (drawn_BS1 * together + np.arange(together)).reshape(num, frames)
    return {
        "pixels": render_clips(clips, frame_BF, rng),
        "words": tokenize(captions_of(clips)),
        "objects": objects_of(clips),
    }
