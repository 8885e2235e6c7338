"""Exact ground truth of a drawn clip.

Legend: T frames; H, W pixels; K sprites (sprite k has id k + 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from foveate.world.scene import Scene


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
    def shot_T(self) -> np.ndarray:
        """Number of the shot of each frame: int64 [T]."""
        lengths = [shot.last - shot.first + 1 for shot in self.scene.shots]
        return np.repeat(np.arange(len(lengths)), lengths)
