"""What the methods of one recipe owe each other: a common budget, and no contradiction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations

from foveate.core.budget import Budget
from foveate.core.card import STAGES, Stage
from foveate.core.method import overrides
from foveate.core.step import Step
from foveate.errors import RecipeError

#: Stages behind which tokens stay away. An encoder brings its tokens back for the projector, so a
#: method that acts in front of it or there alone takes nothing from the budget of the others.
_LASTING: tuple[Stage, ...] = ("frames", "projector", "decoder", "cache")


# -- budgets ------------------------------------------------------------------------------------


def joint_budgets(steps: Sequence[Step], budget: Budget) -> tuple[Budget, ...]:
    """The budget of every step, so that together they leave what `budget` says.

    Fractions multiply: the steps without a budget of their own share what those with one leave of
    it, `rest ** (share / sum of shares)` each. Methods that act at patches or inside the encoder
    alone are apart, unless the recipe has no others: they keep their own budget or default.
    Without a budget of the call everybody does.

    Raises:
        RecipeError: nobody is left to take the budget, the steps with one keep less than it asks
            for, or fractions meet absolute counts.

    Example:
        >>> from foveate.core import Recipe
        >>> steps = Recipe.parse("divprune + quickvideo(share=2)").steps
        >>> [round(b.retain, 3) for b in joint_budgets(steps, Budget(retain=0.125))]
        [0.5, 0.25]
    """
    own = tuple(map(_own, steps))
    if budget.retain is None and budget.tokens is None:
        return own
    if budget.is_full:
        return tuple(Budget(retain=1.0) for _ in steps)
    group = _group(steps)
    free = [index for index in group if steps[index].budget is None]
    fixed = [index for index in group if index not in free]
    out = list(own)
    if budget.tokens is not None:
        rests = [_tokens_before(steps, budget, group, index) for index in free]
    else:
        rests = [_rest(steps, budget, fixed)] * len(free)
    for place, index in enumerate(free):
        # A count is divided among those to come, as it is a fraction of what each of them sees.
        rivals = free[place:] if budget.tokens is not None else free
        out[index] = rests[place].part(steps[index].share / sum(steps[i].share for i in rivals))
    return tuple(out)


def _own(step: Step) -> Budget:
    """What a step keeps where a call leaves it to the recipe."""
    if step.budget is not None:
        return step.budget
    if step.default is not None:
        return Budget(retain=step.default)
    return Budget(retain=step.method.card.retain, published=True)


def _group(steps: Sequence[Step]) -> list[int]:
    """The steps that share the budget of a call, in the order of data flow."""

    def stages(step: Step) -> list[Stage]:
        return [stage for stage in step.stages if stage in step.method.reducing_stages()]

    reducing = {index: stages(step) for index, step in enumerate(steps) if stages(step)}
    lasting = [index for index, at in reducing.items() if set(at) & set(_LASTING)]
    for group in (lasting, [index for index in reducing if index not in lasting]):
        if any(steps[index].budget is None for index in group):
            return sorted(group, key=lambda index: (STAGES.index(reducing[index][0]), index))
    text = " + ".join(map(str, steps))
    if reducing:
        raise RecipeError(
            f"Every method of {text} has a budget of its own; drop retain/tokens here."
        )
    raise RecipeError(
        f"{text} changes attention and reduces nothing, so it takes no budget: drop retain/tokens, "
        f'or add a method that reduces, e.g. "divprune + {text}".'
    )


def _rest(steps: Sequence[Step], budget: Budget, fixed: Iterable[int]) -> Budget:
    """The fraction that the steps with a budget leave to the others."""
    rest = budget
    for index in fixed:
        own, step = steps[index].budget, steps[index]
        assert own is not None
        if own.retain is None:
            raise RecipeError(
                f"{step} is an absolute count, and what is left of a fraction beside it depends on "
                "the input: write its budget as retain=, or ask for tokens=."
            )
        divided = rest.divided(own)
        if divided is None:
            raise RecipeError(
                f"{step} has a budget of its own, which leaves too little: the recipe cannot keep "
                f"{budget.retain}. Ask for less, or drop the method's own budget."
            )
        rest = divided
    return rest


def _tokens_before(steps: Sequence[Step], budget: Budget, group: list[int], index: int) -> Budget:
    """The count to reach at step `index`, so that the fractions of later ones end at `budget`."""
    tokens = budget
    for later in group[group.index(index) + 1 :]:
        own = steps[later].budget
        if own is not None and own.retain is not None:
            tokens = tokens.before(own)
    return tokens


# -- contradictions -----------------------------------------------------------------------------


def refuse_conflicts(steps: Sequence[Step]) -> None:
    """Refuse pairs of methods of which one takes away what the other stands on.

    Raises:
        RecipeError: with the pair and the reason.

    Example:
        >>> from foveate.core import Recipe
        >>> refuse_conflicts(Recipe.parse("divprune(retain=0.5) + holitom").steps)
        Traceback (most recent call last):
        ...
        foveate.errors.RecipeError: divprune + holitom: holitom reads the frames and rows of an \
item, so no other projector method can come before it: put it first.
    """
    for one, other in combinations(steps, 2):
        for rule in _RULES:
            reason = rule(one, other) or (rule(other, one) if rule in _SYMMETRIC else None)
            if reason is not None:
                raise RecipeError(f"{one.method.name} + {other.method.name}: {reason}")


def _reads_layout(one: Step, other: Step) -> str | None:
    if _both_at("projector", one, other) and not other.method.any_tokens:
        return (
            f"{other.method.name} reads the frames and rows of an item, so no other projector "
            "method can come before it: put it first."
        )
    return None


def _both_renumber(one: Step, other: Step) -> str | None:
    if _both_at("decoder", one, other) and one.method.renumbers and other.method.renumbers:
        return (
            "both number the tokens anew behind their cuts in the decoder, so neither would find "
            "the positions it was published with. Use one of them."
        )
    return None


def _parks_and_renumbers(one: Step, other: Step) -> str | None:
    parks = overrides(one.method, "return_layers")
    if _both_at("decoder", one, other) and parks and other.method.renumbers:
        return (
            f"{one.method.name} brings tokens back to the positions they had, and "
            f"{other.method.name} numbers the tokens anew in between. Use one of them."
        )
    return None


def _one_choice(one: Step, other: Step) -> str | None:
    if "cache" in one.stages and one.method.one_cache_choice and _reduces_at("cache", other):
        return (
            f"{one.method.name} chooses once for the caches of all layers, behind the last one; "
            f"{other.method.name} thins them out one by one before that, so the slots would not "
            "match. Use one of the two."
        )
    return None


def _reads_in_blocks(one: Step, other: Step) -> str | None:
    if "cache" not in one.stages or not overrides(one.method, "prefill"):
        return None
    if _reduces_at("cache", other):
        return (
            f"{one.method.name} rebuilds the cache of every layer before the question is read, so "
            f"{other.method.name} would reduce what is reduced already. Use one of them."
        )
    if "decoder" in other.stages and overrides(other.method, "decoder", "attention_rule"):
        return (
            f"{one.method.name} reads the prompt in the same blocks in every layer, and "
            f"{other.method.name} changes what layers see or hold. Use one of them, or a method at "
            f"the projector beside {one.method.name}."
        )
    return None


def _both_stretch(one: Step, other: Step) -> str | None:
    if _both_at("decoder", one, other) and _both_override("rotary_scale", one, other):
        return "both stretch rotary positions, which have one scale. Use one of them."
    return None


def _both_choose_frames(one: Step, other: Step) -> str | None:
    if _both_at("frames", one, other):
        return (
            "both choose the frames of a clip. Leave one of them out of that stage: "
            f'"{other.method.name}@{",".join(s for s in other.stages if s != "frames") or "..."}".'
        )
    return None


def _both_store(one: Step, other: Step) -> str | None:
    if _both_at("cache", one, other) and _both_override("cache_storage", one, other):
        return "both say how the cache is stored. Use one of them."
    return None


def _both_override(hook: str, one: Step, other: Step) -> bool:
    return overrides(one.method, hook) and overrides(other.method, hook)


def _reduces_at(stage: Stage, step: Step) -> bool:
    return stage in step.stages and stage in step.method.reducing_stages()


def _dropped_patches(one: Step, other: Step) -> str | None:
    inside = "encoder" in one.stages and one.method.encoder_drops
    if not inside and "patches" not in one.stages:
        return None
    named = [need for needs in other.method.needs for need in _names(needs)]
    maps = [name for name in named if name.startswith("encoder.") and name != "encoder.pixels"]
    if maps or ("projector" in other.stages and overrides(other.method, "encoder_layers")):
        what = maps[0] if maps else "attention of its blocks"
        where = "inside" if inside else "before"
        return (
            f"{one.method.name} drops patches {where} the encoder, so {other.method.name} would "
            f"find no {what} for them. Use one of the two, or one that reads tokens alone "
            "(divprune)."
        )
    return None


def _joins_frames(one: Step, other: Step) -> str | None:
    if "encoder" not in one.stages or not overrides(one.method, "encoder_joins"):
        return None
    if "encoder" not in other.stages and "patches" not in other.stages:
        return None
    return (
        f"{one.method.name} joins frames of a clip inside the encoder, and {other.method.name} "
        "expects every image there in a row of its own. Use one of the two, or "
        f"{other.method.name} at another stage."
    )


def _names(need: str | tuple[str, ...]) -> tuple[str, ...]:
    return (need,) if isinstance(need, str) else need


def _both_at(stage: Stage, one: Step, other: Step) -> bool:
    return stage in one.stages and stage in other.stages


_Rule = Callable[[Step, Step], str | None]
#: Rules of a pair in the order of the recipe, and of a pair whichever comes first.
_ORDERED: tuple[_Rule, ...] = (
    _both_choose_frames,
    _reads_layout,
    _both_renumber,
    _both_stretch,
    _both_store,
)
_SYMMETRIC: tuple[_Rule, ...] = (
    _dropped_patches,
    _joins_frames,
    _parks_and_renumbers,
    _reads_in_blocks,
    _one_choice,
)
_RULES = _ORDERED + _SYMMETRIC
