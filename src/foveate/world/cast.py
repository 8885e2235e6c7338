"""Sampling of scenes: who is in a clip, where, when, and how the camera moves.

Roles, and what they are built to keep from leaking:

* ``still`` stays in one region all the time (where); ``herd`` are small copies of one shape
  (count).
* ``mover`` and ``rest`` share one distribution of positions, seen in a frame drawn at random: a
  single frame tells neither the direction nor whether a thing moves.
* ``visit`` comes and goes within 3/16 to 5/16 of the clip: which visitor came first, and when,
  cannot be read off a single frame; ``needle`` is there for one or two frames.
* ``late`` appears for good, ``gone`` disappears for good (change); ``sign`` carries text
  (reading); ``speck`` is a distractor that no question names.
"""

from __future__ import annotations

from itertools import pairwise
from numbers import Integral
from typing import Any

from foveate.world.draw import Draw
from foveate.world.scene import Point, Role, Scene, Shot, Sprite
from foveate.world.vocabulary import (
    COLORS,
    DIGITS,
    DIRECTIONS,
    REGIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    WORDS,
)

#: Centres of rows and columns of the 3 x 3 regions, and how far things stray from them.
_CENTERS, _JITTER = (0.18, 0.5, 0.82), 0.05
#: How far a mover travels, and where the middle of its way lies around the frame's centre.
_TRAVEL, _MIDDLE = 0.46, 0.12
_SOLO_ROLES: dict[Role, float] = {
    "still": 0.24,
    "rest": 0.17,
    "mover": 0.17,
    "late": 0.13,
    "gone": 0.09,
    "visit": 0.2,
}
#: How many clips have a needle, fraction.
NEEDLE_CHANCE = 0.35
#: Frames of a visit as fractions of the clip.
_VISIT = (3 / 16, 5 / 16)


class _Cast:
    """Builds the sprites of one scene."""

    def __init__(self, draw: Draw, frames: int) -> None:
        self.draw = draw
        self.frames = frames
        self.sprites: list[Sprite] = []
        self.taken: list[tuple[Point, float]] = []
        self.shapes: list[str] = draw.shuffled(SHAPES)
        self.colors = draw.shuffled(COLORS)
        self.places = draw.shuffled((row, column) for row in range(3) for column in range(3))

    def add(self, role: Role, **facts: Any) -> None:
        """Append a sprite with the next id."""
        values: dict[str, Any] = {
            "id": len(self.sprites) + 1,
            "kind": "shape",
            "role": role,
            "first": 0,
            "last": self.frames - 1,
            "depth": self.draw.uniform(),
        }
        values.update(facts)
        values.setdefault("end", values["start"])
        self.sprites.append(Sprite(**values))
        self.taken.append((values["start"], values["radius"]))

    def look(self, color: str) -> dict[str, Any]:
        """A colour's exact value, a texture and a size."""
        draw = self.draw
        rgb = tuple(max(0, min(247, level + draw.integer(-10, 10))) for level in COLORS[color])
        size = draw.choice(SIZES)
        radius = draw.uniform(0.09, 0.105) if size == "small" else draw.uniform(0.125, 0.145)
        texture = draw.weighted({name: 5.0 if name == "plain" else 1.0 for name in TEXTURES})
        return {"rgb": rgb, "color": color, "texture": texture, "size": size, "radius": radius}

    def place(self) -> dict[str, Any]:
        """A region nobody else has yet, or a free spot when all are taken."""
        row, column = self.places.pop() if self.places else (1, 1)
        start = tuple(
            _CENTERS[index] + self.draw.uniform(-_JITTER, _JITTER) for index in (column, row)
        )
        return {"start": start, "region": REGIONS[row][column]}

    def window(self, low: int, high: int) -> tuple[int, int]:
        """First and last frame of a stretch of `low` to `high` frames, anywhere in the clip."""
        length = self.draw.integer(low, min(high, self.frames))
        first = self.draw.integer(0, self.frames - length)
        return first, first + length - 1

    # -- roles ----------------------------------------------------------------------------------

    def solo(self, role: Role) -> None:
        """A sprite whose shape and colour nobody else has."""
        facts = {"shape": self.shapes.pop(), **self.look(self.colors.pop())}
        middle = self.frames / 2
        turn = round(middle + self.draw.uniform(-0.25, 0.25) * self.frames)
        turn = max(1, min(self.frames - 1, turn))
        if role in ("mover", "rest"):
            facts |= self._path(moving=role == "mover")
        else:
            facts |= self.place()
        if role == "late":
            facts["first"] = turn
        elif role == "gone":
            facts["last"] = turn - 1
        elif role == "visit":
            low, high = (max(1, round(part * self.frames)) for part in _VISIT)
            facts["first"], facts["last"] = self.window(low, high)
        elif role == "needle":
            facts["first"], facts["last"] = self.window(1, 2)
        self.add(role, **facts)

    def _path(self, *, moving: bool) -> dict[str, Any]:
        """A way through the middle of the frame; a resting thing stands at a moment of such a way.

        Seen at a moment drawn at random, both coordinates have the same distribution whatever the
        direction, and the same for things at rest.
        """
        draw = self.draw
        direction = draw.choice(tuple(DIRECTIONS))
        step_x, step_y = DIRECTIONS[direction]
        middle = [0.5 + draw.uniform(-_MIDDLE, _MIDDLE) for _ in range(2)]
        stray = [draw.uniform(-_TRAVEL / 2, _TRAVEL / 2) for _ in range(2)]
        if not moving:
            return {"start": (middle[0] + stray[0], middle[1] + stray[1])}
        x = middle[0] + (0 if step_x else stray[0])
        y = middle[1] + (0 if step_y else stray[1])
        half_x, half_y = step_x * _TRAVEL / 2, step_y * _TRAVEL / 2
        return {
            "start": (x - half_x, y - half_y),
            "end": (x + half_x, y + half_y),
            "direction": direction,
            "sway": draw.uniform(0.0, 0.03),
            # In front of what stands still, more often than not.
            "depth": draw.uniform(0.4, 1.4),
        }

    def sign(self) -> None:
        """A plate with a digit or a short word, most often there from start to end."""
        draw = self.draw
        is_word = draw.chance(0.4)
        facts = self.place()
        radius = draw.uniform(0.085, 0.095) if is_word else draw.uniform(0.105, 0.12)
        x, y = facts["start"]
        # The whole plate stays inside the frame: its half width is that of the text.
        reach = radius * (2.8 if is_word else 1.0)
        facts["start"] = (min(max(x, reach), 1 - reach), y)
        if draw.chance(0.25):
            low = max(1, round(0.35 * self.frames))
            facts["first"], facts["last"] = self.window(low, self.frames)
        level = draw.integer(10, 45)
        self.add(
            "sign",
            kind="sign",
            text=draw.choice(WORDS if is_word else DIGITS),
            radius=radius,
            rgb=(level, level, level),
            depth=2.0,
            **facts,
        )

    def herd(self) -> None:
        """One to five small copies of a shape nobody else has, apart from everything."""
        draw = self.draw
        shape = self.shapes.pop()
        color = draw.choice(tuple(COLORS)) if not self.colors else self.colors.pop()
        for _ in range(draw.integer(1, 5)):
            facts = self.look(color) | {"radius": draw.uniform(0.06, 0.068), "size": "small"}
            spots = [(draw.uniform(0.09, 0.91), draw.uniform(0.09, 0.91)) for _ in range(16)]
            start = max(spots, key=self._room)
            self.add("herd", shape=shape, start=start, depth=1.5, **facts)

    def _room(self, spot: Point) -> float:
        """Free space around a spot, fraction of the frame."""
        return min(
            (max(abs(spot[0] - x), abs(spot[1] - y)) - radius for (x, y), radius in self.taken),
            default=1.0,
        )

    def speck(self) -> None:
        """A dull blob that drifts about."""
        draw = self.draw
        level = draw.integer(70, 130)
        start = (draw.uniform(0.1, 0.9), draw.uniform(0.1, 0.9))
        drift = (draw.uniform(-0.3, 0.3), draw.uniform(-0.3, 0.3))
        self.add(
            "speck",
            kind="speck",
            radius=draw.uniform(0.03, 0.05),
            start=start,
            end=(start[0] + drift[0], start[1] + drift[1]),
            rgb=(level, level - 12, level - 24),
            depth=0.0,
        )


def _solo_role(draw: Draw) -> Role:
    return draw.weighted(_SOLO_ROLES)


def _shots(draw: Draw, name: str, frames: int, natural: float) -> tuple[Shot, ...]:
    """Cuts and camera movement: most shots stand still, some pan, some zoom."""
    cuts: list[int] = []
    if frames >= 8 and draw.chance(0.35):
        for _ in range(draw.integer(1, 2)):
            cut = draw.integer(3, frames - 3)
            if all(abs(cut - other) >= 3 for other in cuts):
                cuts.append(cut)
    edges = [0, *sorted(cuts), frames]
    shots = []
    for number, (first, after) in enumerate(pairwise(edges)):
        kind = "natural" if draw.chance(natural) else "textured"
        camera = draw.weighted({"still": 5.0, "pan": 3.0, "zoom": 2.0})
        pan: tuple[Point, Point] = ((0.5, 0.5), (0.5, 0.5))
        zoom, room = (1.0, 1.0), 1.0
        if camera == "pan":
            begin, end = ((draw.uniform(), draw.uniform()) for _ in range(2))
            pan, room = (begin, end), 1.5
        elif camera == "zoom":
            near = draw.uniform(1.2, 1.6)
            zoom = (1.0, near) if draw.chance(0.5) else (near, 1.0)
        shots.append(Shot(first, after - 1, kind, f"{name}/shot{number}", pan, zoom, room))
    return tuple(shots)


def sample_scene(name: str, frames: int, *, natural: float = 0.0, noise: int = 3) -> Scene:
    """Draw a scene.

    Args:
        name: of its stream of draws; equal names give equal scenes.
        frames: number of frames, at least 4.
        natural: fraction of shots with a natural background.
        noise: sensor noise, levels of 255.

    Raises:
        ValueError: too few frames, or a fraction or noise out of range.

    Example:
        >>> sample_scene("a", 16) == sample_scene("a", 16)
        True
    """
    if not isinstance(frames, Integral):
        raise ValueError(f"a scene has a whole number of frames, got {frames}.")
    if frames < 4:
        raise ValueError(f"a scene needs at least 4 frames, got {frames}.")
    if not 0 <= natural <= 1:
        raise ValueError(f"natural is a fraction in [0, 1], got {natural}.")
    if not 0 <= noise <= 8:
        raise ValueError(f"noise must be 0 to 8 levels, got {noise}.")
    draw = Draw(name)
    cast = _Cast(draw, frames)
    # Visits come in pairs often enough to ask which came first.
    if draw.chance(0.35):
        # The third one's role is drawn whether there is one or not.
        third: list[Role] = [_solo_role(draw)] * draw.integer(0, 1)
        roles: list[Role] = ["visit", "visit", *third]
    else:
        roles = [_solo_role(draw) for _ in range(draw.integer(2, 4))]
    for role in roles:
        cast.solo(role)
    if draw.chance(NEEDLE_CHANCE):
        cast.solo("needle")
    if draw.chance(0.45):
        cast.sign()
    if draw.chance(0.4):
        cast.herd()
    for _ in range(draw.integer(0, 2)):
        cast.speck()
    return Scene(name, frames, tuple(cast.sprites), _shots(draw, name, frames, natural), noise)
