"""Scenes of long clips: quiet stretches, and events in them that a question asks about.

What a question names (a shape, or a colour) occurs nowhere else in the clip; what it asks for is
drawn without regard to the rest, so that frames outside of the event tell nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from foveate.world.cast import _TRAVEL, _VISIT, _Cast
from foveate.world.draw import Draw
from foveate.world.questions import Question, order_is_clear, plural
from foveate.world.scene import Point, Role, Scene, Shot
from foveate.world.vocabulary import (
    COLORS,
    COUNTS,
    DIGITS,
    DIRECTIONS,
    REGIONS,
    SHAPES,
    WORDS,
)

#: By what an event's things are named, and what "what" then asks for.
Naming = Literal["shape", "color"]
#: What fills a clip: how many things a quiet scene has, and what they do.
_CROWD = {0: 0.35, 1: 0.4, 2: 0.25}
_QUIET_ROLES: dict[Role, float] = {"still": 0.4, "rest": 0.2, "mover": 0.2, "visit": 0.2}
#: Fraction of the signs that hold a word.
_WORDY = 0.4
_ALL_REGIONS = tuple(region for row in REGIONS for region in row)


@dataclass(frozen=True)
class Window:
    """Frames of a scene in which an event lies, the last included."""

    first: int
    last: int

    @property
    def frames(self) -> int:
        """How many."""
        return self.last - self.first + 1


def quiet_cast(
    draw: Draw, frames: int, naming: Naming, reserved: tuple[str, ...], *, crowd: bool = True
) -> _Cast:
    """A scene's things but for its event: none that a question of the clip could mean.

    Args:
        draw: stream of draws.
        frames: of the scene.
        naming: which attribute names things in this clip.
        reserved: names that belong to its events.
        crowd: whether there are things at all, beside specks.
    """
    cast = _Cast(draw, frames)
    if naming == "shape":
        cast.shapes = [shape for shape in cast.shapes if shape not in reserved]
    else:
        cast.colors = [color for color in cast.colors if color not in reserved]
    if crowd:
        for _ in range(draw.weighted(_CROWD)):
            cast.solo(draw.weighted(_QUIET_ROLES))
    for _ in range(draw.integer(0, 2)):
        cast.speck()
    return cast


def quiet_shot(draw: Draw, name: str, frames: int) -> Shot:
    """One background and camera movement for a scene: most stand still."""
    camera = draw.weighted({"still": 6.0, "pan": 3.0, "zoom": 1.0})
    pan: tuple[Point, Point] = ((0.5, 0.5), (0.5, 0.5))
    zoom, room = (1.0, 1.0), 1.0
    if camera == "pan":
        begin, end = ((draw.uniform(), draw.uniform()) for _ in range(2))
        pan, room = (begin, end), 1.5
    elif camera == "zoom":
        near = draw.uniform(1.2, 1.6)
        zoom = (1.0, near) if draw.chance(0.5) else (near, 1.0)
    return Shot(0, frames - 1, "textured", f"{name}/shot", pan, zoom, room)


def scene_of(name: str, cast: _Cast, *, noise: int) -> Scene:
    """The scene with this cast."""
    shot = quiet_shot(Draw(name, "camera"), name, cast.frames)
    return Scene(name, cast.frames, tuple(cast.sprites), (shot,), noise)


# -- events ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Named:
    """What an event's things are called in this clip.

    Attributes:
        naming: the attribute that names them.
        names: one for each thing, reserved for it.
    """

    naming: Naming
    names: tuple[str, ...]

    def look(self, cast: _Cast, draw: Draw, place: int = 0) -> dict[str, Any]:
        """Shape, colour and the rest of one thing; the attribute that is not its name is free."""
        name = self.names[place]
        shape = name if self.naming == "shape" else draw.choice(SHAPES)
        color = name if self.naming == "color" else draw.choice(tuple(COLORS))
        return {"shape": shape, **cast.look(color)}

    def words(self, place: int = 0) -> str:
        """What a question calls it: "star", "red object"."""
        name = self.names[place]
        return name if self.naming == "shape" else f"{name} object"


def _last_id(cast: _Cast) -> int:
    return len(cast.sprites)


def _front(window: Window) -> dict[str, Any]:
    """There during the event, in front of everything."""
    return {"first": window.first, "last": window.last, "depth": 3.0}


def _what(cast: _Cast, draw: Draw, window: Window, named: Named) -> Question:
    look = named.look(cast, draw)
    cast.add("visit", **look, **cast.place(), **_front(window))
    if named.naming == "shape":
        text, answer, options = f"what color is the {named.words()}?", look["color"], tuple(COLORS)
    else:
        text, answer, options = f"what shape is the {named.words()}?", look["shape"], SHAPES
    return Question("what", text, answer, options, (_last_id(cast),))


def _where(cast: _Cast, draw: Draw, window: Window, named: Named) -> Question:
    row, column = draw.integer(0, 2), draw.integer(0, 2)
    cast.places.append((row, column))
    cast.add("visit", **named.look(cast, draw), **cast.place(), **_front(window))
    text = f"where is the {named.words()}?"
    return Question("where", text, REGIONS[row][column], _ALL_REGIONS, (_last_id(cast),))


def _reading(cast: _Cast, draw: Draw, window: Window, named: Named) -> Question:
    is_word = draw.chance(_WORDY)
    radius = draw.uniform(0.085, 0.095) if is_word else draw.uniform(0.105, 0.12)
    facts = cast.place()
    x, y = facts["start"]
    # The whole plate stays inside the frame: its half width is that of the text.
    reach = radius * (2.8 if is_word else 1.0)
    facts["start"] = (min(max(x, reach), 1 - reach), y)
    kind, options = ("word", WORDS) if is_word else ("number", DIGITS)
    level, answer = draw.integer(10, 45), draw.choice(options)
    facts |= {"kind": "sign", "text": answer, "radius": radius, "rgb": (level, level, level)}
    cast.add("sign", **facts, **_front(window))
    return Question("reading", f"what {kind} is on the sign?", answer, options, (_last_id(cast),))


def _count(cast: _Cast, draw: Draw, window: Window, named: Named) -> Question:
    look, number = named.look(cast, draw), draw.integer(1, 5)
    first = _last_id(cast) + 1
    for _ in range(number):
        size = {"radius": draw.uniform(0.06, 0.068), "size": "small"}
        spots = [(draw.uniform(0.09, 0.91), draw.uniform(0.09, 0.91)) for _ in range(16)]
        start = max(spots, key=cast._room)
        cast.add("herd", **(look | size), start=start, **_front(window))
    text = f"how many {plural(look['shape'])} are there?"
    about = tuple(range(first, _last_id(cast) + 1))
    return Question("count", text, str(number), COUNTS, about)


def _direction(cast: _Cast, draw: Draw, window: Window, named: Named) -> Question:
    path = cast._path(moving=True)
    (x0, y0), (x1, y1) = path["start"], path["end"]
    # Paths are laid over whole scenes: lengthened, so that the event holds the way of a mover.
    steps = max(window.frames - 1, 1)
    before, behind = window.first / steps, (cast.frames - 1 - window.first) / steps
    path["start"] = (x0 - (x1 - x0) * before, y0 - (y1 - y0) * before)
    path["end"] = (x0 + (x1 - x0) * behind, y0 + (y1 - y0) * behind)
    path["sway"] = 0.0
    cast.add("mover", **(named.look(cast, draw) | path | _front(window)))
    text = f"which way does the {named.words()} move?"
    answer = path["direction"]
    return Question("direction", text, answer, tuple(DIRECTIONS), (_last_id(cast),))


def _order(cast: _Cast, draw: Draw, window: Window, named: Named) -> Question:
    low, high = (max(1, round(part * window.frames)) for part in _VISIT)
    while True:
        inner = _Cast(draw, window.frames)
        stays = [inner.window(low, high) for _ in range(2)]
        for first, last in stays:
            inner.add("visit", **named.look(inner, draw), start=(0.5, 0.5), first=first, last=last)
        one, other = inner.sprites
        if order_is_clear(one, other, window.frames):
            break
    for place, (first, last) in enumerate(stays):
        when = {"first": window.first + first, "last": window.first + last, "depth": 3.0}
        cast.add("visit", **named.look(cast, draw, place), **cast.place(), **when)
    second = _last_id(cast)
    words = named.words(0), named.words(1)
    answer = named.names[0 if stays[0][0] < stays[1][0] else 1]
    text = f"which comes first, the {words[0]} or the {words[1]}?"
    return Question("order", text, answer, named.names, (second - 1, second))


_EVENTS: dict[str, Callable[[_Cast, Draw, Window, Named], Question]] = {
    "what": _what,
    "where": _where,
    "reading": _reading,
    "count": _count,
    "direction": _direction,
    "order": _order,
}
#: Tasks of long clips -> how many names each needs.
LONG_TASKS: dict[str, int] = {
    "what": 1,
    "where": 1,
    "reading": 0,
    "count": 1,
    "direction": 1,
    "order": 2,
}
#: Tasks whose questions can name things by their shape alone.
BY_SHAPE = ("count", "order")
assert tuple(_EVENTS) == tuple(LONG_TASKS) and _TRAVEL < 0.5


def add_event(cast: _Cast, draw: Draw, task: str, window: Window, named: Named) -> Question:
    """Put an event into a scene's cast; its question."""
    return _EVENTS[task](cast, draw, window, named)
