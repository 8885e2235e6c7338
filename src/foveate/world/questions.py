"""Questions with short closed answers, read off a scene.

Every question is decided by the scene alone and asked only where the answer is beyond doubt; how
the answers stay balanced, and why neither the words nor a single frame give them away, is a
property of the sampling in `foveate.world.cast`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from foveate.world.draw import Draw
from foveate.world.scene import Role, Scene, Sprite
from foveate.world.vocabulary import (
    COLORS,
    COUNTS,
    DIGITS,
    DIRECTIONS,
    REGIONS,
    SHAPES,
    TASKS,
    TIMES,
    WORDS,
)


@dataclass(frozen=True)
class Question:
    """One question about a clip.

    Attributes:
        task: one of `TASKS`.
        text: the question, lower case, with its question mark.
        answer: one word.
        options: all answers that the question admits.
        about: ids of the sprites that decide it.
    """

    task: str
    text: str
    answer: str
    options: tuple[str, ...]
    about: tuple[int, ...] = ()

    @property
    def chance(self) -> float:
        """Accuracy of guessing among the options."""
        return 1 / len(self.options)


_ALL_REGIONS = tuple(region for row in REGIONS for region in row)
#: Whose color and shape are asked for; there is too little of a needle to ask.
_LASTING: tuple[Role, ...] = ("still", "rest", "mover", "late", "gone", "visit")
#: Edges of early, middle and late as fractions of the clip: equally wide, with gaps between.
_THIRDS = {"early": (0.0, 0.30), "middle": (0.395, 0.605), "late": (0.70, 1.0)}
#: Frames between the beginnings of two visits that can be told apart, fraction of the clip.
_ORDER_GAP = 3 / 16


def time_of(sprite: Sprite, frames: int) -> str:
    """Early, middle or late: where the middle of a visit lies; empty on the edges between."""
    middle = (sprite.first + sprite.last + 1) / 2 / frames
    for name, (low, high) in _THIRDS.items():
        if low <= middle <= high:
            return name
    return ""


def order_is_clear(one: Sprite, other: Sprite, frames: int) -> bool:
    """Whether two visits begin far enough apart to say which comes first."""
    return abs(one.first - other.first) >= _ORDER_GAP * frames


def _name(draw: Draw, sprite: Sprite) -> str:
    """The star, the red star or the red object: all of them unique."""
    return draw.choice(
        (sprite.shape, sprite.shape, f"{sprite.color} {sprite.shape}", f"{sprite.color} object")
    )


def _what(scene: Scene, draw: Draw) -> Iterator[Question]:
    for sprite in scene.having(*_LASTING):
        about = (sprite.id,)
        text = f"what color is the {sprite.shape}?"
        yield Question("what", text, sprite.color, tuple(COLORS), about)
        text = f"what shape is the {sprite.color} object?"
        yield Question("what", text, sprite.shape, SHAPES, about)


def _where(scene: Scene, draw: Draw) -> Iterator[Question]:
    for sprite in scene.having("still"):
        text = f"where is the {_name(draw, sprite)}?"
        yield Question("where", text, sprite.region, _ALL_REGIONS, (sprite.id,))


def _count(scene: Scene, draw: Draw) -> Iterator[Question]:
    herd = scene.having("herd")
    if herd:
        text = f"how many {plural(herd[0].shape)} are there?"
        yield Question("count", text, str(len(herd)), COUNTS, tuple(one.id for one in herd))


def _direction(scene: Scene, draw: Draw) -> Iterator[Question]:
    for sprite in scene.having("mover"):
        text = f"which way does the {_name(draw, sprite)} move?"
        yield Question("direction", text, sprite.direction, tuple(DIRECTIONS), (sprite.id,))


def _order(scene: Scene, draw: Draw) -> Iterator[Question]:
    visits = scene.having("visit")
    for place, one in enumerate(visits):
        for other in visits[place + 1 :]:
            if not order_is_clear(one, other, scene.frames):
                continue
            left, right = draw.shuffled((one, other))
            answer = min(one, other, key=lambda sprite: sprite.first).shape
            text = f"which comes first, the {left.shape} or the {right.shape}?"
            yield Question("order", text, answer, (left.shape, right.shape), (left.id, right.id))


def _when(scene: Scene, draw: Draw) -> Iterator[Question]:
    for sprite in scene.having("visit"):
        if time := time_of(sprite, scene.frames):
            text = f"when does the {_name(draw, sprite)} come?"
            yield Question("when", text, time, TIMES, (sprite.id,))


def _reading(scene: Scene, draw: Draw) -> Iterator[Question]:
    for sprite in scene.having("sign"):
        is_digit = sprite.text in DIGITS
        kind, options = ("number", DIGITS) if is_digit else ("word", WORDS)
        yield Question(
            "reading", f"what {kind} is on the sign?", sprite.text, options, (sprite.id,)
        )


def _needle(scene: Scene, draw: Draw) -> Iterator[Question]:
    for sprite in scene.having("needle"):
        about = (sprite.id,)
        yield Question("needle", "what flashes?", sprite.shape, SHAPES, about)
        yield Question("needle", "what color is the flash?", sprite.color, tuple(COLORS), about)


def _change(scene: Scene, draw: Draw) -> Iterator[Question]:
    seen = [sprite for sprite in scene.sprites if sprite.kind != "speck"]
    last = scene.frames - 1
    first_seen = {sprite.id for sprite in seen if sprite.present(0)}
    last_seen = {sprite.id for sprite in seen if sprite.present(last)}
    for text, changed in (
        ("what is new at the end?", last_seen - first_seen),
        ("what is gone at the end?", first_seen - last_seen),
    ):
        if len(changed) == 1:
            sprite = scene.sprites[changed.pop() - 1]
            if sprite.kind == "shape":
                yield Question("change", text, sprite.shape, SHAPES, (sprite.id,))


def _moving(scene: Scene, draw: Draw) -> Iterator[Question]:
    for sprite in scene.having("mover", "rest"):
        answer = "moving" if sprite.role == "mover" else "still"
        text = f"is the {_name(draw, sprite)} moving or still?"
        yield Question("moving", text, answer, ("moving", "still"), (sprite.id,))


_ASKING: dict[str, Callable[[Scene, Draw], Iterator[Question]]] = {
    "what": _what,
    "where": _where,
    "count": _count,
    "direction": _direction,
    "order": _order,
    "when": _when,
    "reading": _reading,
    "needle": _needle,
    "change": _change,
    "moving": _moving,
}
assert tuple(_ASKING) == tuple(TASKS)


def plural(shape: str) -> str:
    """The plural of a shape's name.

    Example:
        >>> plural("cross"), plural("star")
        ('crosses', 'stars')
    """
    return shape + ("es" if shape.endswith("s") else "s")


def questions_of(
    scene: Scene, *, tasks: tuple[str, ...] = tuple(TASKS), per_task: int | None = None
) -> tuple[Question, ...]:
    """The questions that a scene can answer, in the order of the tasks.

    Args:
        scene: the scene.
        tasks: which to ask.
        per_task: at most so many of each task, drawn at random; None: all.

    Raises:
        ValueError: an unknown task, or `per_task` below 1.

    Example:
        >>> from foveate.world.cast import sample_scene
        >>> {question.task for question in questions_of(sample_scene("a", 16))} <= set(TASKS)
        True
    """
    unknown = [task for task in tasks if task not in _ASKING]
    if unknown:
        raise ValueError(f"unknown task {unknown[0]!r}; choose from {', '.join(TASKS)}.")
    if per_task is not None and per_task < 1:
        raise ValueError(f"per_task must be at least 1, got {per_task}.")
    chosen: list[Question] = []
    for task in tasks:
        # A stream of draws for each task: the choice of tasks does not change their questions.
        draw = Draw(scene.name, task)
        found = draw.shuffled(list(_ASKING[task](scene, draw)))
        chosen += found if per_task is None else found[:per_task]
    return tuple(chosen)
