"""What can be guessed without watching: from the question alone, or from one exact frame.

A benchmark of video asks for watching only as far as such baselines stay near chance. The blind
one knows the wording; the single-frame one is an oracle that is told everything about one frame
drawn at random but its number. Both are fitted on one stream of questions and scored on another.

Legend: N questions; O options; F features.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from foveate.world.draw import Draw
from foveate.world.questions import Question, plural, questions_of
from foveate.world.scene import Scene, Sprite
from foveate.world.vocabulary import COLORS, SHAPES, TEMPORAL_TASKS

_NAMES = "|".join([*map(plural, SHAPES), *SHAPES, *COLORS, "object"])
_NAMED = re.compile(rf"\b(?:{_NAMES})(?: (?:{_NAMES}))*\b")
_CENTERS = np.array([0.18, 0.5, 0.82])


def wording(text: str) -> str:
    """A question without the names of shapes and colours.

    Example:
        >>> wording("which comes first, the star or the red ring?")
        'which comes first, the _ or the _?'
    """
    return _NAMED.sub("_", text)


def blind_accuracy(train: Iterable[Question], test: Iterable[Question]) -> dict[str, float]:
    """Accuracy by task of the best constant answer to each wording.

    Args:
        train: questions that the answers are chosen on.
        test: questions that they are scored on.
    """
    seen: dict[str, Counter[int]] = defaultdict(Counter)
    for question in train:
        seen[wording(question.text)][question.options.index(question.answer)] += 1
    right: dict[str, list[bool]] = defaultdict(list)
    for question in test:
        counts = seen[wording(question.text)]
        guess = max(range(len(question.options)), key=lambda place, counts=counts: counts[place])
        right[question.task].append(question.options[guess] == question.answer)
    return {task: float(np.mean(hits)) for task, hits in right.items()}


@dataclass(frozen=True)
class Glimpse:
    """Everything that one frame shows, and a question about its clip.

    Attributes:
        question: the question.
        sprites: those in the frame.
        places: their centres, fractions of width and height.
    """

    question: Question
    sprites: tuple[Sprite, ...]
    places: tuple[tuple[float, float], ...]

    @property
    def shown(self) -> dict[str, list[int]]:
        """Positions in `sprites` by shape and by colour."""
        found: dict[str, list[int]] = defaultdict(list)
        for number, sprite in enumerate(self.sprites):
            if sprite.kind == "shape":
                found[sprite.shape].append(number)
                found[sprite.color].append(number)
        return found


def glimpse(scene: Scene, question: Question) -> Glimpse:
    """One frame of a scene, drawn at random, next to a question."""
    frame = Draw(scene.name, "glimpse", question.text).integer(0, scene.frames - 1)
    seen = tuple(sprite for sprite in scene.sprites if sprite.present(frame))
    return Glimpse(question, seen, tuple(one.center(frame, scene.frames) for one in seen))


def glimpses(scenes: Iterable[Scene], tasks: Sequence[str] = TEMPORAL_TASKS) -> list[Glimpse]:
    """One glimpse for each question of these tasks."""
    return [
        glimpse(scene, question)
        for scene in scenes
        for question in questions_of(scene, tasks=tuple(tasks))
    ]


# -- guessing among what a frame leaves open ------------------------------------------------------


def _standing(one: Glimpse, option: str) -> bool:
    """Whether the option names a single thing at the centre of a region."""
    numbers = one.shown.get(option, [])
    if len(numbers) != 1:
        return False
    place = np.array(one.places[numbers[0]])
    return bool((np.abs(place[:, None] - _CENTERS).min(1) <= 0.05).all())


_LEFT_OPEN: dict[str, Callable[[Glimpse, str], bool]] = {
    "any": lambda one, option: True,
    "shown": lambda one, option: option in one.shown,
    "standing": _standing,
    "not shown": lambda one, option: option not in one.shown,
}


def guess_accuracy(train: Sequence[Glimpse], test: Sequence[Glimpse]) -> dict[str, float]:
    """Accuracy by task of guessing among the options that one frame cannot but leave open.

    For each wording the guesser knows whether to guess among the things shown, among those that
    stand at the centre of a region, among those not shown, or among all options: whichever was
    best on `train`. Where none is left, it guesses among all.
    """
    gains: dict[tuple[str, str], list[float]] = defaultdict(list)
    for one in train:
        for rule in _LEFT_OPEN:
            gains[wording(one.question.text), rule].append(_gain(one, rule))
    hits: dict[str, list[float]] = defaultdict(list)
    for one in test:
        text = wording(one.question.text)
        best = max(_LEFT_OPEN, key=lambda rule, text=text: np.mean(gains[text, rule] or [0.0]))
        hits[one.question.task].append(_gain(one, best))
    return {task: float(np.mean(found)) for task, found in hits.items()}


def _gain(one: Glimpse, rule: str) -> float:
    options = one.question.options
    left = [option for option in options if _LEFT_OPEN[rule](one, option)] or list(options)
    return (one.question.answer in left) / len(left)


# -- the fitted oracle ----------------------------------------------------------------------------


def _thing(one: Glimpse, numbers: list[int]) -> list[float]:
    """What a frame tells about a thing: 0 throughout when it is not in it."""
    if not numbers:
        return [0.0] * 25
    sprite, (x, y) = one.sprites[numbers[0]], one.places[numbers[0]]
    u, v = x - 0.5, y - 0.5
    aside = max(float(np.abs(_CENTERS - x).min()), float(np.abs(_CENTERS - y).min()))
    above = below = 0
    for other, (other_x, other_y) in zip(one.sprites, one.places, strict=True):
        if other is not sprite and max(abs(x - other_x), abs(y - other_y)) < (
            sprite.radius + other.radius
        ):
            above += sprite.depth > other.depth
            below += sprite.depth < other.depth
    cell = [0.0] * 9
    cell[min(int(y * 3), 2) * 3 + min(int(x * 3), 2)] = 1.0
    shape = [u, v, 4 * u * u, 4 * v * v, 4 * u * v, abs(u), abs(v)]
    look = [5 * sprite.radius, float(sprite.texture == "plain"), float(len(numbers) > 1)]
    return [
        1.0,
        *shape,
        *look,
        aside,
        float(aside <= 0.05),
        above,
        below,
        len(one.sprites) / 5,
        *cell,
    ]


def _features(one: Glimpse) -> np.ndarray:
    """Features of each option: float64 [O, F], zero columns for other kinds of options."""
    shown, question = one.shown, one.question
    kinds = len({sprite.shape for sprite in one.sprites if sprite.kind == "shape"})
    scene = [1.0, kinds / 5, float(any(sprite.kind == "sign" for sprite in one.sprites))]
    if question.options[0] in SHAPES or question.options[0] in COLORS:
        # Options are things: the same weights for each, and one set more for its rank in the text.
        rows = []
        for place, option in enumerate(question.options):
            thing = _thing(one, shown.get(option, []))
            hidden = [value * (option not in shown) for value in scene]
            crowd = [thing[0] * value for value in (*scene, 1 / max(kinds, 1))]
            rows.append([*thing, *hidden, *crowd, float(place == 0)])
        return np.array(rows)
    # Options are classes: a set of weights for each.
    words = re.findall(r"\w+", question.text)
    named = next((shown[word] for word in words if word in shown), [])
    facts = np.array([*_thing(one, named), *scene])
    return np.kron(np.eye(len(question.options)), facts)


def single_frame_accuracy(
    train: Sequence[Glimpse], test: Sequence[Glimpse], *, steps: int = 300
) -> dict[str, float]:
    """Accuracy by task of a conditional logit on all that one random frame shows.

    It is fitted for each wording on its own, on features of each option: whether the thing is in
    the frame, where (up to second order, and by region), how big, alone or one of several, on a
    region's centre or off it, above or below others, and how many things there are.
    Complexity: O(steps N O F).

    Args:
        train: glimpses that the weights are fitted on.
        test: glimpses that they are scored on.
        steps: of gradient descent (Adam).
    """
    groups: dict[str, tuple[list[Glimpse], list[Glimpse]]] = defaultdict(lambda: ([], []))
    for which, found in enumerate((train, test)):
        for one in found:
            groups[wording(one.question.text)][which].append(one)
    hits: dict[str, list[bool]] = defaultdict(list)
    for fitted, scored in groups.values():
        if fitted and scored:
            weights_F = _fit(*_arrays(fitted), steps)
            x_NOF, answer_N = _arrays(scored)
            hits[scored[0].question.task] += list((x_NOF @ weights_F).argmax(1) == answer_N)
    return {task: float(np.mean(found)) for task, found in hits.items()}


def _arrays(found: list[Glimpse]) -> tuple[np.ndarray, np.ndarray]:
    answers = [one.question.options.index(one.question.answer) for one in found]
    return np.stack([_features(one) for one in found]), np.array(answers)


def _fit(x_NOF: np.ndarray, answer_N: np.ndarray, steps: int) -> np.ndarray:
    """Weights [F] of a conditional logit with a little weight decay, by Adam."""
    count, _, features = x_NOF.shape
    weights_F = np.zeros(features)
    mean_F, square_F = np.zeros(features), np.zeros(features)
    chosen_F = x_NOF[np.arange(count), answer_N].mean(0)
    for step in range(1, steps + 1):
        logits_NO = x_NOF @ weights_F
        p_NO = np.exp(logits_NO - logits_NO.max(1, keepdims=True))
        p_NO /= p_NO.sum(1, keepdims=True)
        gradient_F = np.tensordot(p_NO, x_NOF, 2) / count - chosen_F + 1e-3 * weights_F
        mean_F = 0.9 * mean_F + 0.1 * gradient_F
        square_F = 0.99 * square_F + 0.01 * gradient_F**2
        scale_F = np.sqrt(square_F / (1 - 0.99**step)) + 1e-8
        weights_F -= 0.05 * mean_F / (1 - 0.9**step) / scale_F
    return weights_F
