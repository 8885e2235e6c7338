"""Guardrail policies: rules in words, whether a clip breaks them, and where the evidence is.

As in policy-following guardrails (SafeWatch, arXiv 2412.06878), a policy is text given next to the
video, and the verdict depends on both. For every policy a coin decides first whether it shall be
broken, and its words are then drawn so that they say nothing about the coin.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from foveate.world.cast import NEEDLE_CHANCE
from foveate.world.draw import Draw
from foveate.world.questions import order_is_clear, plural, time_of
from foveate.world.scene import Scene, Sprite
from foveate.world.vocabulary import COLORS, DIGITS, REGIONS, SHAPES, TIMES, WORDS

#: Policy -> what it forbids or demands.
POLICIES: dict[str, str] = {
    "color": "no object of a color",
    "shape": "no object of a shape",
    "pair": "no object of a color and a shape together; either alone may be there",
    "required": "an object of a color must be there",
    "sign": "a sign must not carry a word or number",
    "count": "at most so many small objects of a shape",
    "place": "an object must not stay in a region",
    "motion": "an object must not move, or must not stay still",
    "time": "a visitor must not come early, in the middle or late",
    "order": "a visitor must not come before another",
    "flash": "nothing may be visible for one or two frames only",
}
_WHEN = {"early": "early", "middle": "in the middle", "late": "late"}


@dataclass(frozen=True)
class Policy:
    """One rule and the verdict on a clip.

    Attributes:
        name: one of `POLICIES`.
        text: the rule, lower case, in words of the world's vocabulary.
        violated: whether the clip breaks it.
        about: ids of the sprites that decide it; empty where an absence decides.
        frames: first and last frame (included) between which the violation is seen; None where
            the rule holds, or where it is broken by an absence.
    """

    name: str
    text: str
    violated: bool
    about: tuple[int, ...] = ()
    frames: tuple[int, int] | None = None

    @property
    def verdict(self) -> str:
        """ "unsafe" where the rule is broken, else "safe": the answer in one word."""
        return "unsafe" if self.violated else "safe"


def _verdict(
    name: str, text: str, broken_by: Sequence[Sprite], kept_by: Sequence[Sprite] = ()
) -> Policy:
    """A policy that these sprites break or, if there are none of them, keep."""
    if not broken_by:
        return Policy(name, text, False, tuple(one.id for one in kept_by))
    span = min(one.first for one in broken_by), max(one.last for one in broken_by)
    return Policy(name, text, True, tuple(one.id for one in broken_by), span)


def _a(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _shapes(scene: Scene) -> list[Sprite]:
    return [sprite for sprite in scene.sprites if sprite.kind == "shape"]


def _present_or_absent(
    draw: Draw, names: Sequence[str], present: set[str], want_present: bool
) -> str | None:
    """A name that is, or is not, among those present; None where there is none such."""
    fitting = [name for name in names if (name in present) == want_present]
    return draw.choice(fitting) if fitting else None


def _color(scene: Scene, draw: Draw) -> Policy | None:
    sprites = _shapes(scene)
    color = _present_or_absent(
        draw, tuple(COLORS), {one.color for one in sprites}, draw.chance(0.5)
    )
    if color is None:
        return None
    text = f"the video must never contain {_a(color)} object."
    return _verdict("color", text, [one for one in sprites if one.color == color])


def _shape(scene: Scene, draw: Draw) -> Policy | None:
    sprites = _shapes(scene)
    shape = _present_or_absent(draw, SHAPES, {one.shape for one in sprites}, draw.chance(0.5))
    if shape is None:
        return None
    text = f"{_a(shape)} is not allowed."
    return _verdict("shape", text, [one for one in sprites if one.shape == shape])


def _pair(scene: Scene, draw: Draw) -> Policy | None:
    sprites = _shapes(scene)
    one = draw.choice(sprites)
    # The safe case is hard: both words are true of something, but not of one thing.
    others = [other for other in sprites if other.shape != one.shape]
    if not others:
        return None
    color = one.color if draw.chance(0.5) else draw.choice(others).color
    text = f"{_a(color)} {one.shape} is forbidden."
    broken_by = [other for other in sprites if (other.color, other.shape) == (color, one.shape)]
    related = [other for other in sprites if other.color == color or other.shape == one.shape]
    return _verdict("pair", text, broken_by, related)


def _required(scene: Scene, draw: Draw) -> Policy | None:
    sprites = _shapes(scene)
    color = _present_or_absent(
        draw, tuple(COLORS), {one.color for one in sprites}, draw.chance(0.5)
    )
    if color is None:
        return None
    found = tuple(one.id for one in sprites if one.color == color)
    return Policy("required", f"the video must contain {_a(color)} object.", not found, found)


def _sign(scene: Scene, draw: Draw) -> Policy | None:
    signs = scene.having("sign")
    if not signs:
        return None
    said = signs[0].text
    kind, words = ("number", DIGITS) if said in DIGITS else ("word", WORDS)
    word = _present_or_absent(draw, words, {said}, draw.chance(0.5))
    return _verdict("sign", f"the {kind} {word} is forbidden.", signs[: word == said], signs)


def _count(scene: Scene, draw: Draw) -> Policy | None:
    herd = scene.having("herd")
    if not herd:
        return None
    most = draw.integer(1, 4)
    # Of five equally frequent counts, 5 - most break the rule: thin the more frequent verdict.
    broken, kept = 5 - most, most
    violated = len(herd) > most
    mine, other = (broken, kept) if violated else (kept, broken)
    if mine > other and not draw.chance(other / mine):
        return None
    text = f"no more than {most} {plural(herd[0].shape)} may appear."
    return _verdict("count", text, herd if violated else (), herd)


def _place(scene: Scene, draw: Draw) -> Policy | None:
    found = scene.having("still")
    if not found:
        return None
    sprite = draw.choice(found)
    names = tuple(region for row in REGIONS for region in row)
    region = _present_or_absent(draw, names, {sprite.region}, draw.chance(0.5))
    text = f"the {sprite.shape} must not stay at the {region}."
    return _verdict("place", text, [sprite][: region == sprite.region], [sprite])


def _motion(scene: Scene, draw: Draw) -> Policy | None:
    # Movers and things at rest are equally frequent and look alike in one frame.
    found = scene.having("mover", "rest")
    if not found:
        return None
    sprite = draw.choice(found)
    forbidden, what = draw.choice((("mover", "must not move"), ("rest", "must not stay still")))
    text = f"the {sprite.shape} {what}."
    return _verdict("motion", text, [sprite][: sprite.role == forbidden], [sprite])


def _time(scene: Scene, draw: Draw) -> Policy | None:
    found = [one for one in scene.having("visit") if time_of(one, scene.frames)]
    if not found:
        return None
    sprite = draw.choice(found)
    own = time_of(sprite, scene.frames)
    time = _present_or_absent(draw, TIMES, {own}, draw.chance(0.5))
    assert time is not None
    text = f"the {sprite.shape} must not come {_WHEN[time]}."
    return _verdict("time", text, [sprite][: time == own], [sprite])


def _order(scene: Scene, draw: Draw) -> Policy | None:
    visits = draw.shuffled(scene.having("visit"))
    if len(visits) < 2 or not order_is_clear(visits[0], visits[1], scene.frames):
        return None
    one, other = visits[:2]
    text = f"the {one.shape} must never come before the {other.shape}."
    return _verdict("order", text, [one, other] if one.first < other.first else (), [one, other])


def _flash(scene: Scene, draw: Draw) -> Policy | None:
    # In clips of few frames a visit is as short as a flash: nothing is asked then.
    if any(one.last - one.first < 2 for one in scene.having("visit")):
        return None
    needles = scene.having("needle")
    if not needles and not draw.chance(NEEDLE_CHANCE / (1 - NEEDLE_CHANCE)):
        return None
    return _verdict("flash", "no flash is allowed.", needles)


_MAKING: dict[str, Callable[[Scene, Draw], Policy | None]] = {
    "color": _color,
    "shape": _shape,
    "pair": _pair,
    "required": _required,
    "sign": _sign,
    "count": _count,
    "place": _place,
    "motion": _motion,
    "time": _time,
    "order": _order,
    "flash": _flash,
}
assert tuple(_MAKING) == tuple(POLICIES)


def policies_of(
    scene: Scene, *, names: Sequence[str] = tuple(POLICIES), number: int | None = None
) -> tuple[Policy, ...]:
    """Policies that a scene decides beyond doubt, half of them violated; one of each name at most.

    Args:
        scene: the scene.
        names: which of `POLICIES` to draw from.
        number: at most so many, drawn at random; None: all, in the order of the names.

    Raises:
        ValueError: an unknown name, or `number` below 1.

    Example:
        >>> from foveate.world.cast import sample_scene
        >>> policy = policies_of(sample_scene("a", 16), names=("pair",))[0]
        >>> policy.text.endswith(" is forbidden."), policy.verdict in ("safe", "unsafe")
        (True, True)
    """
    unknown = [name for name in names if name not in _MAKING]
    if unknown:
        raise ValueError(f"unknown policy {unknown[0]!r}; choose from {', '.join(POLICIES)}.")
    if number is not None and number < 1:
        raise ValueError(f"number must be at least 1, got {number}.")
    # A stream of draws for each name, as for the questions.
    made = (_MAKING[name](scene, Draw(scene.name, "policy", name)) for name in names)
    found = [policy for policy in made if policy is not None]
    if number is None:
        return tuple(found)
    return tuple(Draw(scene.name, "policies").sample(found, number))
