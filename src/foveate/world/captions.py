"""Sentences about a scene from a small grammar: for captioning and retrieval."""

from __future__ import annotations

from foveate.world.questions import plural, time_of
from foveate.world.scene import Scene, Sprite
from foveate.world.vocabulary import SHAPES

_WHEN = {"early": " early", "middle": " in the middle", "late": " late", "": ""}
_WHAT_IT_DOES = {
    "rest": "stays still",
    "late": "appears",
    "gone": "disappears",
}


def _clause(sprite: Sprite, frames: int) -> str:
    article = "an" if sprite.color[0] in "aeiou" else "a"
    named = f"{article} {sprite.color} {sprite.shape}"
    if sprite.role == "still":
        return f"{named} stays at the {sprite.region}"
    if sprite.role == "mover":
        return f"{named} moves {sprite.direction}"
    if sprite.role in ("visit", "needle"):
        verb = "comes" if sprite.role == "visit" else "flashes"
        return f"{named} {verb}{_WHEN[time_of(sprite, frames)]}"
    return f"{named} {_WHAT_IT_DOES[sprite.role]}"


def caption_of(scene: Scene) -> str:
    """What a scene shows, one sentence per thing, in the order of `SHAPES`; signs last.

    Example:
        >>> from foveate.world.cast import sample_scene
        >>> caption_of(sample_scene("a", 16)).endswith(".")
        True
    """
    clauses: list[tuple[int, str]] = []
    herd = scene.having("herd")
    if herd:
        name = herd[0].shape if len(herd) == 1 else plural(herd[0].shape)
        clauses.append((SHAPES.index(herd[0].shape), f"{len(herd)} small {herd[0].color} {name}"))
    for sprite in scene.sprites:
        if sprite.kind == "shape" and sprite.role != "herd":
            clauses.append((SHAPES.index(sprite.shape), _clause(sprite, scene.frames)))
        elif sprite.kind == "sign":
            clauses.append((len(SHAPES), f"a sign says {sprite.text}"))
    return " ".join(f"{text} ." for _, text in sorted(clauses))
