"""Answers questions from drawn masks alone: no roles, times, paths or regions of the scene."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from foveate.world import Question, Sample

# The words are written out here on purpose: the solver shares nothing with the package.
PLURALS = {"crosses": "cross"}
ROWS = ("top", "", "bottom"), ("left", "", "right")


@dataclass(frozen=True)
class Thing:
    """What may be known of a sprite without its scene: its name tag, and where it shows."""

    kind: str
    shape: str
    color: str
    text: str
    mask_THW: np.ndarray

    @property
    def area_T(self) -> np.ndarray:
        return self.mask_THW.sum((1, 2))

    @property
    def seen(self) -> list[int]:
        """Frames that show it."""
        return np.flatnonzero(self.area_T).tolist()

    def middle(self, frame: int) -> np.ndarray:
        """Middle of its box, x and y as fractions of the frame."""
        rows, columns = np.nonzero(self.mask_THW[frame])
        height, width = self.mask_THW.shape[1:]
        x, y = columns.min() + columns.max() + 1, rows.min() + rows.max() + 1
        return np.array([x / 2 / width, y / 2 / height])

    def there(self, frame: int, covered_THW: np.ndarray) -> bool:
        """Whether it shows at the first or last frame, or is hidden: things cover its place."""
        place_HW = self.mask_THW[self.seen[frame]]
        return bool(self.area_T[frame]) or bool(covered_THW[frame][place_HW].mean() > 0.9)

    def way(self) -> np.ndarray:
        """How far it gets between the first and the last frame that show most of it."""
        clear = np.flatnonzero(self.area_T >= 0.7 * self.area_T.max())
        return self.middle(clear[-1]) - self.middle(clear[0])


def things(sample: Sample) -> list[Thing]:
    """The name tags of a sample's sprites with the masks that were drawn."""
    return [
        Thing(one.kind, one.shape, one.color, one.text, sample.masks_THW == one.id)
        for one in sample.scene.sprites
    ]


def solve(question: Question, found: list[Thing]) -> str:
    """The answer that the masks give."""
    words = set(re.findall(r"[\w-]+", question.text))
    named = [one for one in found if one.kind == "shape" and words & {one.shape, one.color}]
    return SOLVERS[question.task](question, found, named)


def what(question: Question, found: list[Thing], named: list[Thing]) -> str:
    looks = {(one.color, one.shape) for one in named if one.seen}
    assert len(looks) == 1, "the question names more than one thing"
    color, shape = looks.pop()
    return color if "what color" in question.text else shape


def where(question: Question, found: list[Thing], named: list[Thing]) -> str:
    (thing,) = named
    x, y = thing.middle(int(thing.area_T.argmax()))
    row, column = ROWS[0][int(y * 3)], ROWS[1][int(x * 3)]
    return "-".join(filter(None, (row, column))) or "center"


def count(question: Question, found: list[Thing], named: list[Thing]) -> str:
    word = question.text.split()[2]
    shape = PLURALS.get(word, word.removesuffix("s"))
    return str(sum(one.shape == shape and len(one.seen) > 0 for one in found))


def direction(question: Question, found: list[Thing], named: list[Thing]) -> str:
    (thing,) = named
    across, down = thing.way()
    if abs(across) > abs(down):
        return "right" if across > 0 else "left"
    return "down" if down > 0 else "up"


def order(question: Question, found: list[Thing], named: list[Thing]) -> str:
    one, other = named
    return min(one, other, key=lambda thing: thing.seen[0]).shape


def when(question: Question, found: list[Thing], named: list[Thing]) -> str:
    (thing,) = named
    middle = (thing.seen[0] + thing.seen[-1] + 1) / 2 / len(thing.mask_THW)
    return ("early", "middle", "late")[int(middle * 3)]


def reading(question: Question, found: list[Thing], named: list[Thing]) -> str:
    (text,) = {one.text for one in found if one.kind == "sign" and one.seen}
    return text


def needle(question: Question, found: list[Thing], named: list[Thing]) -> str:
    (thing,) = (one for one in found if one.kind == "shape" and len(one.seen) <= 2)
    return thing.color if "color" in question.text else thing.shape


def change(question: Question, found: list[Thing], named: list[Thing]) -> str:
    new = "new" in question.text
    covered_THW = np.logical_or.reduce([one.mask_THW for one in found])
    (shape,) = {
        one.shape
        for one in found
        if one.kind != "speck"
        and (one.there(-1, covered_THW), one.there(0, covered_THW)) == (new, not new)
    }
    return shape


def moving(question: Question, found: list[Thing], named: list[Thing]) -> str:
    # No sprite is wider than 0.3 of a frame; whatever moves sweeps more than that.
    (thing,) = named
    rows, columns = np.nonzero(thing.mask_THW.any(0))
    height, width = thing.mask_THW.shape[1:]
    swept = max(np.ptp(rows) / height, np.ptp(columns) / width)
    return "moving" if swept > 0.33 else "still"


SOLVERS = {
    "what": what,
    "where": where,
    "count": count,
    "direction": direction,
    "order": order,
    "when": when,
    "reading": reading,
    "needle": needle,
    "change": change,
    "moving": moving,
}
