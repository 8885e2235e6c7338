"""Which method acts where inside the language model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from foveate.core import Budget, Method, Recipe, Reduction, Stage
from foveate.errors import AttachmentError
from foveate.models.adapter import Adapter


@dataclass(eq=False)
class StepPlan:
    """One method in the decoder or at the cache: where it acts and with which budget.

    `returns` are the layers before which parked tokens come back, `observes` those whose modules
    the method observes, `stages` all stages at which the recipe lets it act.
    """

    number: int
    method: Method
    layers: frozenset[int]
    budget: Callable[[int], Budget]
    returns: frozenset[int] = frozenset()
    renumbers: bool = False
    observes: frozenset[int] = frozenset()
    stages: tuple[Stage, ...] = ()


def placed(reduction: Reduction | None, method: Method, device: torch.device) -> Reduction | None:
    """The reduction if it changes anything, checked for what the middle of a sequence needs."""
    if reduction is None or reduction.is_identity:
        return None
    if reduction.mask_BM is not None:
        reduction = reduction.sample(0)
    anchor_M = reduction.anchor_BM[0].sort().values
    if bool((anchor_M < 0).any() | (anchor_M[1:] == anchor_M[:-1]).any()):
        raise ValueError(
            f"{method.name}: tokens inside the language model stand in the place of one of their "
            f"sources, each in another; its reduction has the anchors {anchor_M.tolist()[:20]}."
        )
    return reduction.to(device)


SampleBudget = Callable[[int], Callable[[int], Budget]]


def plan_decoder(
    recipe: Recipe, adapter: Adapter, model: nn.Module, budget: SampleBudget
) -> list[StepPlan]:
    """The decoder-stage methods of a recipe on a model.

    Raises:
        AttachmentError: a method names a layer that does not exist or cannot be.
    """
    num_layers, plans = len(adapter.layers(model)), []
    for index in recipe.at("decoder"):
        method = recipe.steps[index].method
        layers, observes = method.decoder_layers(num_layers), method.observe_layers(num_layers)
        for what, named in (("act before", layers), ("observe", observes)):
            wrong = [layer for layer in named if not 0 <= layer < num_layers]
            if wrong:
                raise AttachmentError(
                    f"{method.name} wants to {what} layer {wrong[0]}; this model has {num_layers} "
                    "layers."
                )
        returns = _returns(method, num_layers, adapter.num_deepstack(model))
        # M-RoPE positions are time, row and column; they stay what they are.
        renumbers = method.renumbers and not adapter.mrope
        plans.append(
            StepPlan(
                index,
                method,
                frozenset(layers),
                budget(index),
                returns,
                renumbers,
                frozenset(observes),
                recipe.steps[index].stages,
            )
        )
    return plans


def plan_cache(recipe: Recipe, num_layers: int, budget: SampleBudget) -> list[StepPlan]:
    """The cache-stage methods of a recipe; they are asked behind every layer."""
    every = frozenset(range(num_layers))
    return [
        StepPlan(index, recipe.steps[index].method, every, budget(index))
        for index in recipe.at("cache")
        if "cache" in recipe.steps[index].method.reducing_stages()
    ]


def _returns(method: Method, num_layers: int, num_deepstack: int) -> frozenset[int]:
    """Layers before which a method's parked tokens come back."""
    returns = frozenset(method.return_layers(num_layers))
    first = min(method.decoder_layers(num_layers), default=0)
    for layer in sorted(returns):
        if not max(first, num_deepstack - 1) < layer < num_layers:
            deepstack = f" and deepstack ends at {num_deepstack}" if num_deepstack else ""
            raise AttachmentError(
                f"{method.name} wants its tokens back before layer {layer}; they leave at layer "
                f"{first} of {num_layers}{deepstack}."
            )
    if returns and method.renumbers:
        raise AttachmentError(
            f"{method.name} renumbers positions and parks tokens; parked tokens return to the "
            "positions they had, so it can do only one of the two."
        )
    return returns


def is_compact(recipe: Recipe, adapter: Adapter) -> bool:
    """Whether a prompt that the projector stage shortened is renumbered.

    Raises:
        AttachmentError: renumbering is asked for on a model with M-RoPE.
    """
    if adapter.mrope:
        if recipe.positions == "compact":
            raise AttachmentError(
                f"{adapter.docs_name} numbers visual tokens by time, row and column (M-RoPE); they "
                'cannot be renumbered. Use positions="original".'
            )
        return False
    if recipe.positions != "auto":
        return recipe.positions == "compact"
    projector = recipe.at("projector")
    return bool(projector) and recipe.steps[projector[0]].method.card.positions == "compact"
