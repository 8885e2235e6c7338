"""Generated motion of a body of 17 joints, seen by a camera.

The joints are those of Human3.6M, in its order; angles follow sums of sinusoids, and a clip may
stand still for a while, several times. Lengths are in metres, x to the right, y forward and z up in
the body's frame; x to the right, y down and z away in the camera's.

Legend: B clips, F frames, J joints, W waves of an angle, H holds of a clip.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]

#: Human3.6M's 17 joints, in its order.
JOINTS = (
    *("hip", "right hip", "right knee", "right foot", "left hip", "left knee", "left foot"),
    *("spine", "thorax", "neck", "head", "left shoulder", "left elbow", "left wrist"),
    *("right shoulder", "right elbow", "right wrist"),
)
#: The joint that each hangs on; the root on none.
PARENTS = (-1, 0, 1, 2, 0, 4, 5, 0, 7, 8, 9, 8, 11, 12, 8, 14, 15)
#: Joints whose parents are in earlier rows: a pose is built row by row.
_ROWS = ((1, 4, 7), (2, 5, 8), (3, 6, 9, 11, 14), (10, 12, 15), (13, 16))
#: From its parent to every joint of an upright body with its arms down, in mm: an adult of 1.7 m.
_BONES = {
    **{1: (133, 0, 0), 2: (0, 0, -443), 3: (0, 0, -454)},
    **{4: (-133, 0, 0), 5: (0, 0, -443), 6: (0, 0, -454)},
    **{7: (0, 0, 233), 8: (0, 0, 257), 9: (0, 30, 117), 10: (0, 0, 115)},
    **{11: (-151, 0, 0), 12: (0, 0, -279), 13: (0, 0, -252)},
    **{14: (151, 0, 0), 15: (0, 0, -279), 16: (0, 0, -252)},
}
#: Of every joint that turns: the middle of its angles about x, y and z, and how far they go.
_ANGLES = {
    0: ((0.0, 0.0, 0.0), (0.15, 0.1, 0.4)),
    1: ((0.3, -0.15, 0.0), (0.6, 0.2, 0.2)),
    2: ((-0.6, 0.0, 0.0), (0.6, 0.0, 0.0)),
    4: ((0.3, 0.15, 0.0), (0.6, 0.2, 0.2)),
    5: ((-0.6, 0.0, 0.0), (0.6, 0.0, 0.0)),
    7: ((0.1, 0.0, 0.0), (0.2, 0.15, 0.2)),
    8: ((0.05, 0.0, 0.0), (0.15, 0.1, 0.2)),
    9: ((0.0, 0.0, 0.0), (0.25, 0.15, 0.3)),
    11: ((0.5, 0.5, 0.0), (0.9, 0.5, 0.4)),
    12: ((0.9, 0.0, 0.0), (0.7, 0.0, 0.0)),
    14: ((0.5, -0.5, 0.0), (0.9, 0.5, 0.4)),
    15: ((0.9, 0.0, 0.0), (0.7, 0.0, 0.0)),
}
#: Seconds between frames: 50 a second, as in Human3.6M.
FRAME_SECONDS = 0.02
#: Cycles per second of the waves, lowest and highest.
_FREQUENCY = (0.2, 1.5)
_WAVES = 3
#: Times that a clip with holds stands still, and for how many frames.
_HOLDS, _HOLD_FRAMES = 3, (4, 8)
#: Focal length over half the width of the picture.
FOCAL = 2.3


@dataclass(frozen=True)
class Clips:
    """A batch of motion.

    Attributes:
        poses: what the camera sees, float32 [B, F, J, 2], in half widths of the picture, noise
            included.
        joints: where the joints are from the root, float32 [B, F, J, 3], in metres along the axes
            of the camera.
        root: where the root is from the camera, float32 [B, F, 3], in metres.
        still: whether the body stands as in the frame before, bool [B, F].
    """

    poses: NDArray[np.float32]
    joints: NDArray[np.float32]
    root: NDArray[np.float32]
    still: NDArray[np.bool_]


def make_clips(
    draw: np.random.Generator,
    clips: int,
    frames: int,
    *,
    holds: float,
    noise: float = 0.005,
) -> Clips:
    """Bodies that move in front of a camera of random place.

    Args:
        draw: random numbers.
        clips: B.
        frames: F, `FRAME_SECONDS` apart.
        holds: fraction of clips that stand still several times, for 4 to 8 frames each.
        noise: standard deviation of what the camera sees, in half widths of the picture.

    Example:
        >>> clips = make_clips(np.random.default_rng(0), 2, 27, holds=1.0)
        >>> clips.poses.shape, clips.joints.shape
        ((2, 27, 17, 2), (2, 27, 17, 3))
    """
    still_BF = _stillness(draw, clips, frames, holds)
    time_BF = np.cumsum(~still_BF, axis=1) * FRAME_SECONDS
    turns_BFJ33 = _rotation(_angles(draw, time_BF))
    scale_B = draw.uniform(0.95, 1.05, clips)
    body_BFJ3 = _stand(turns_BFJ33) * scale_B[:, None, None, None]
    root_BF3, view_B33 = _camera(draw, time_BF)
    joints_BFJ3 = np.einsum("bij,bfkj->bfki", view_B33, body_BFJ3)
    seen_BFJ2 = project(joints_BFJ3 + root_BF3[:, :, None])
    seen_BFJ2 = seen_BFJ2 + noise * draw.standard_normal(seen_BFJ2.shape)
    return Clips(
        seen_BFJ2.astype(np.float32),
        joints_BFJ3.astype(np.float32),
        root_BF3.astype(np.float32),
        still_BF,
    )


def project(points: Array) -> Array:
    """Perspective projection, [..., 3] in metres -> [..., 2] in half widths of the picture.

    Example:
        >>> project(np.array([1.0, 0.5, 4.6])).round(3).tolist()
        [0.5, 0.25]
    """
    return FOCAL * points[..., :2] / points[..., 2:]


def _stillness(
    draw: np.random.Generator, clips: int, frames: int, holds: float
) -> NDArray[np.bool_]:
    """Frames that are as the one before, [B, F]; the first never is."""
    shortest, longest = _HOLD_FRAMES
    length_BH1 = draw.integers(shortest, longest + 1, (clips, _HOLDS, 1))
    begin_BH1 = draw.integers(1, max(frames - shortest, 2), (clips, _HOLDS, 1))
    frame_F = np.arange(frames)
    held_BF = ((begin_BH1 <= frame_F) & (frame_F < begin_BH1 + length_BH1)).any(axis=1)
    return held_BF & (draw.random((clips, 1)) < holds)


def _angles(draw: np.random.Generator, time_BF: Array) -> Array:
    """Angles about x, y and z of every joint, [B, F, J, 3]."""
    clips, joints = len(time_BF), len(JOINTS)
    middle_J3, reach_J3 = np.zeros((2, joints, 3))
    for joint, (middle, reach) in _ANGLES.items():
        middle_J3[joint], reach_J3[joint] = middle, reach
    shape = clips, joints, 3
    part_BJ3W = draw.random((*shape, _WAVES))
    part_BJ3W /= part_BJ3W.sum(axis=-1, keepdims=True)
    speed_BJ3W = 2 * np.pi * draw.uniform(*_FREQUENCY, part_BJ3W.shape)
    phase_BJ3W = draw.uniform(0, 2 * np.pi, part_BJ3W.shape)
    wave_BFJ3W = np.sin(speed_BJ3W[:, None] * time_BF[:, :, None, None, None] + phase_BJ3W[:, None])
    swing_BFJ3 = np.einsum("bjaw,bfjaw->bfja", part_BJ3W, wave_BFJ3W)
    return middle_J3 + reach_J3 * swing_BFJ3


def _rotation(angle: Array) -> Array:
    """Rotation about x, then y, then z: [..., 3] -> [..., 3, 3]."""
    (cx, cy, cz), (sx, sy, sz) = (np.moveaxis(f(angle), -1, 0) for f in (np.cos, np.sin))
    rows = (
        (cz * cy, cz * sy * sx - sz * cx, cz * sy * cx + sz * sx),
        (sz * cy, sz * sy * sx + cz * cx, sz * sy * cx - cz * sx),
        (-sy, cy * sx, cy * cx),
    )
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def _stand(turns_BFJ33: Array) -> Array:
    """Places of the joints from the root, [B, F, J, 3], all joints of a row at once."""
    place_BFJ3 = np.zeros(turns_BFJ33.shape[:-1])
    whole_BFJ33 = turns_BFJ33.copy()
    for row in _ROWS:
        here, parents = list(row), [PARENTS[joint] for joint in row]
        bone_R3 = np.array([_BONES[joint] for joint in row]) / 1000
        carried = whole_BFJ33[:, :, parents]
        place_BFJ3[:, :, here] = place_BFJ3[:, :, parents] + (carried @ bone_R3[..., None])[..., 0]
        whole_BFJ33[:, :, here] = carried @ turns_BFJ33[:, :, here]
    return place_BFJ3


def _camera(draw: np.random.Generator, time_BF: Array) -> tuple[Array, Array]:
    """Places of the root [B, F, 3] and rotation of the body [B, 3, 3], seen by the camera."""
    clips = len(time_BF)
    begin_B3 = draw.uniform((-0.5, -0.2, 4.0), (0.5, 0.2, 6.0), (clips, 3))
    speed_B3 = draw.uniform(-0.2, 0.2, (clips, 3)) * (1.0, 0.2, 1.0)
    heading_B, tilt_B = draw.uniform((-np.pi, 0.0), (np.pi, 0.35), (clips, 2)).T
    around, down = np.zeros((2, clips, 3))
    around[:, 2], down[:, 0] = heading_B, tilt_B
    # Up is against the camera's y axis, and what is ahead along its z axis.
    axes_33 = np.array([(1.0, 0.0, 0.0), (0.0, 0.0, -1.0), (0.0, 1.0, 0.0)])
    view_B33 = _rotation(down) @ (axes_33 @ _rotation(around))
    return begin_B3[:, None] + speed_B3[:, None] * time_BF[..., None], view_B33
