"""What happens in a clip, before any pixel: sprites, their paths and times, shots and camera.

Positions are fractions of the frame's width and height, radii fractions of its shorter side; times
are frame numbers. So one scene can be drawn at any resolution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Role = Literal["still", "rest", "mover", "late", "gone", "visit", "needle", "sign", "herd", "speck"]
Kind = Literal["shape", "sign", "speck"]
Point = tuple[float, float]


@dataclass(frozen=True)
class Sprite:
    """One thing in the scene.

    Attributes:
        id: 1, 2, ...; its value in the masks.
        kind: "shape", a "sign" with text, or a "speck" (a dull blob that no question asks about).
        role: what it is there for; see `foveate.world.cast`.
        shape: one of `SHAPES`; empty for signs and specks.
        color: one of `COLORS`; empty for signs and specks.
        rgb: the colour drawn, near that of the name.
        texture: one of `TEXTURES`.
        size: "small" or "big".
        radius: half its extent, fraction of the frame's shorter side; of a sign, half its height.
        start: centre at frame 0 (where it would be), fractions of width and height.
        end: centre at the last frame.
        sway: amplitude of a sine across the path, fraction of the frame.
        first: first frame that it is in.
        last: last frame that it is in (included).
        depth: later sprites hide earlier ones.
        text: of a sign.
        region: name of the region it stays in; empty when it moves.
        direction: "left", "right", "up", "down", or empty.
    """

    id: int
    kind: Kind
    role: Role
    radius: float
    start: Point
    end: Point
    first: int
    last: int
    rgb: tuple[int, int, int]
    shape: str = ""
    color: str = ""
    texture: str = "plain"
    size: str = "small"
    sway: float = 0.0
    depth: float = 0.0
    text: str = ""
    region: str = ""
    direction: str = ""

    def center(self, frame: int, frames: int) -> Point:
        """Where its centre is at a frame of a clip of so many, fractions of width and height."""
        if self.start == self.end:
            return self.start
        part = frame / max(frames - 1, 1)
        (x0, y0), (x1, y1) = self.start, self.end
        across = self.sway * math.sin(2 * math.pi * part)
        length = math.hypot(x1 - x0, y1 - y0)
        x = x0 + (x1 - x0) * part - (y1 - y0) / length * across
        y = y0 + (y1 - y0) * part + (x1 - x0) / length * across
        return x, y

    def present(self, frame: int) -> bool:
        """Whether it is in the scene at a frame (it may still be hidden by another)."""
        return self.first <= frame <= self.last


@dataclass(frozen=True)
class Shot:
    """A stretch between two cuts: one background, one movement of the camera.

    Attributes:
        first: first frame.
        last: last frame (included).
        background: "textured" or "natural".
        seed: names the background's stream of draws.
        pan: where the view begins and ends on the canvas, fractions of the room there is; the
            canvas is `room` times as large as the view.
        zoom: scale of the view at the first and last frame; 1 shows the frame's own size.
        room: size of the canvas over that of the frame; 1 for a still camera.
    """

    first: int
    last: int
    background: Literal["textured", "natural"]
    seed: str
    pan: tuple[Point, Point] = ((0.5, 0.5), (0.5, 0.5))
    zoom: tuple[float, float] = (1.0, 1.0)
    room: float = 1.0

    @property
    def still(self) -> bool:
        """Whether the camera stands still."""
        return self.pan[0] == self.pan[1] and self.zoom[0] == self.zoom[1]

    def view(self, frame: int) -> tuple[float, float, float]:
        """Left and top of the view (fractions of the room there is) and its zoom at a frame."""
        part = (frame - self.first) / max(self.last - self.first, 1)
        (x0, y0), (x1, y1) = self.pan
        zoom = self.zoom[0] + (self.zoom[1] - self.zoom[0]) * part
        return x0 + (x1 - x0) * part, y0 + (y1 - y0) * part, zoom


@dataclass(frozen=True)
class Scene:
    """Everything that determines a clip but its resolution.

    Attributes:
        name: of its stream of draws, such as "0/test/17".
        frames: number of frames.
        sprites: by id: `sprites[i].id == i + 1`.
        shots: in order, covering all frames.
        noise: sensor noise, levels of 255 (0: none).
    """

    name: str
    frames: int
    sprites: tuple[Sprite, ...]
    shots: tuple[Shot, ...]
    noise: int = 0

    @property
    def cuts(self) -> tuple[int, ...]:
        """Frames at which a new shot begins, the first frame excepted."""
        return tuple(shot.first for shot in self.shots[1:])

    def having(self, *roles: Role) -> list[Sprite]:
        """The sprites with one of these roles."""
        return [sprite for sprite in self.sprites if sprite.role in roles]
