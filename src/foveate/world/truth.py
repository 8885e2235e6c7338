"""Exact ground truth of a drawn clip.

Legend: T frames; H, W pixels; K sprites (sprite k has id k + 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from foveate.world.scene import Scene
from foveate.world.vocabulary import SHAPES

#: Semantic classes by number: background, the shapes in their order, signs, specks.
CLASSES: tuple[str, ...] = ("background", *SHAPES, "sign", "speck")


@dataclass(frozen=True, eq=False)
class Truth:
    """What is where, frame by frame.

    Attributes:
        scene: the scene.
        masks_THW: id of the topmost sprite at each pixel, 0 for background: uint8 [T, H, W].
    """

    scene: Scene
    masks_THW: np.ndarray

    @property
    def ids(self) -> tuple[int, ...]:
        """Ids of all sprites, 1 to K."""
        return tuple(sprite.id for sprite in self.scene.sprites)

    @property
    def cuts(self) -> tuple[int, ...]:
        """Frames at which a new shot begins, the first frame excepted."""
        return self.scene.cuts

    @cached_property
    def classes_THW(self) -> np.ndarray:
        """Number in `CLASSES` of what is seen at each pixel: uint8 [T, H, W]; O(T H W)."""
        names = (sprite.shape or sprite.kind for sprite in self.scene.sprites)
        table = np.array([0, *(CLASSES.index(name) for name in names)], dtype=np.uint8)
        return table[self.masks_THW]

    @cached_property
    def areas_TK(self) -> np.ndarray:
        """Visible pixels of each sprite: int64 [T, K]; 0 where it is absent or hidden."""
        count = len(self.scene.sprites) + 1
        frames = np.arange(len(self.masks_THW))[:, None, None] * count
        flat = (self.masks_THW.astype(np.int64) + frames).reshape(-1)
        return np.bincount(flat, minlength=len(self.masks_THW) * count).reshape(-1, count)[:, 1:]

    @cached_property
    def boxes_TK4(self) -> np.ndarray:
        """Boxes around visible pixels: int64 [T, K, 4] as left, top, right, bottom (exclusive).

        All -1 where a sprite shows no pixel. Complexity: O(T H W + K T (H + W)).
        """
        height, width = self.masks_THW.shape[1:]
        boxes = np.full((len(self.masks_THW), len(self.scene.sprites), 4), -1, dtype=np.int64)
        for slot, identity in enumerate(self.ids):
            hit_THW = self.masks_THW == identity
            columns_TW, rows_TH = hit_THW.any(1), hit_THW.any(2)
            seen_T = columns_TW.any(1)
            edges = (
                columns_TW.argmax(1),
                rows_TH.argmax(1),
                width - columns_TW[:, ::-1].argmax(1),
                height - rows_TH[:, ::-1].argmax(1),
            )
            boxes[seen_T, slot] = np.stack(edges, axis=1)[seen_T]
        return boxes

    @cached_property
    def centers_TK2(self) -> np.ndarray:
        """Trajectories: float64 [T, K, 2], x and y as fractions of width and height.

        Where a sprite is not in the scene: NaN. Hidden sprites keep their place.
        """
        frames = self.scene.frames
        centers = np.full((frames, len(self.scene.sprites), 2), np.nan)
        for slot, sprite in enumerate(self.scene.sprites):
            for frame in range(sprite.first, sprite.last + 1):
                centers[frame, slot] = sprite.center(frame, frames)
        return centers

    def trajectory(self, identity: int) -> np.ndarray:
        """The way of one sprite, by its id: float64 [T, 2] as in `centers_TK2`.

        Raises:
            ValueError: no sprite has this id.
        """
        if identity not in self.ids:
            raise ValueError(f"sprites have ids 1 to {len(self.ids)}, got {identity}.")
        return self.centers_TK2[:, identity - 1]

    @cached_property
    def present_TK(self) -> np.ndarray:
        """Whether each sprite is in the scene, hidden or not: bool [T, K]."""
        return ~np.isnan(self.centers_TK2[..., 0])

    @cached_property
    def camera_T3(self) -> np.ndarray:
        """Camera: float64 [T, 3]: left and top of the view (fractions of its room) and zoom."""
        shots = self.scene.shots
        return np.array(
            [shot.view(frame) for shot in shots for frame in range(shot.first, shot.last + 1)]
        )

    @cached_property
    def windows_T4(self) -> np.ndarray:
        """What the camera sees of its shot's canvas: float64 [T, 4], fractions of the canvas.

        As left, top, right, bottom. With the canvas `room` times as large as a frame, the
        background shifts against the motion of the window, by whole pixels while it pans.
        """
        rooms_T = np.array([self.scene.shots[number].room for number in self.shot_T])
        share_T1 = (1 / (rooms_T * self.camera_T3[:, 2]))[:, None]
        corner_T2 = self.camera_T3[:, :2] * (1 - share_T1)
        return np.concatenate([corner_T2, corner_T2 + share_T1], axis=1)

    @cached_property
    def static_T(self) -> np.ndarray:
        """Whether the background is that of the frame before, up to noise: bool [T]."""
        same_T = np.zeros(self.scene.frames, dtype=bool)
        shots_T = self.shot_T
        still = np.array([shot.still for shot in self.scene.shots])
        same_T[1:] = (shots_T[1:] == shots_T[:-1]) & still[shots_T[1:]]
        return same_T

    @cached_property
    def shot_T(self) -> np.ndarray:
        """Number of the shot of each frame: int64 [T]."""
        lengths = [shot.last - shot.first + 1 for shot in self.scene.shots]
        return np.repeat(np.arange(len(lengths)), lengths)
