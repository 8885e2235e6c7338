"""Rotary positions of the language model, stretched per sample where a method asks for it.

The model's own module is never changed: (cos, sin) come from a shallow copy that holds other
frequencies, and replace those that the layers are given.

Legend: B batch, L padded length, P rows of position ids.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from foveate import ops
from foveate.attach.cache import ReducedLayer
from foveate.attach.plan import SampleBudget, StepPlan
from foveate.attach.rules import Embeddings, context_of_rule
from foveate.core import Recipe, Report
from foveate.core.method import overrides
from foveate.errors import AttachmentError
from foveate.models.adapter import Adapter

if TYPE_CHECKING:
    from foveate.attach.decoder import DecoderCall

#: All families with an adapter are so; encoders that are not take `foveate.models.windowed`.
FRAME_BY_FRAME = "this encoder works frame by frame, so the rearrangement is the identity"
#: Rotary embeddings that choose their frequencies anew in every call.
_MOVING = ("dynamic", "longrope")


class Rotary:
    """(cos, sin) of position ids, as the model makes them or with slower frequencies.

    Args:
        module: the language model's rotary embedding.
        mrope: positions have time, row and column.
        scale: per sample, how far its positions are stretched; None: not at all.
    """

    def __init__(self, module: Any, mrope: bool, scale: list[float] | None = None) -> None:
        self.module, self.mrope, self.scale = module, mrope, scale
        self._made: dict[float, Any] = {1.0: module}

    @property
    def attention_scaling(self) -> float:
        """What cos and sin are multiplied with."""
        return float(getattr(self.module, "attention_scaling", 1.0))

    def of_rows(
        self, hidden: torch.Tensor, position_PBL: torch.Tensor, sample: int | None = None
    ) -> Embeddings:
        """(cos, sin) of position ids [P, B, L], or [P, 1, L] of one sample."""
        position = position_PBL[-3:].expand(3, -1, -1) if self.mrope else position_PBL[0]
        return self(hidden, position, sample)

    def __call__(
        self, hidden: torch.Tensor, position: torch.Tensor, sample: int | None = None
    ) -> Embeddings:
        """(cos, sin) of position ids as the module takes them, of all samples or of one.

        `hidden` lends its dtype and device.
        """
        if self.scale is None:
            return self.module(hidden, position)
        scale = self.scale if sample is None else [self.scale[sample]]
        distinct = sorted(set(scale))
        if len(distinct) == 1:
            return self._at(distinct[0], hidden, position)
        rows = [[row for row, s in enumerate(scale) if s == one] for one in distinct]
        parts = [
            self._at(one, hidden, position[..., mine, :])
            for one, mine in zip(distinct, rows, strict=True)
        ]
        order = torch.tensor([row for mine in rows for row in mine]).argsort().to(hidden.device)
        cos, sin = zip(*parts, strict=True)
        return (
            torch.cat(cos, dim=-3).index_select(-3, order),
            torch.cat(sin, dim=-3).index_select(-3, order),
        )

    def _at(self, scale: float, hidden: torch.Tensor, position: torch.Tensor) -> Embeddings:
        if scale not in self._made:
            self._made[scale] = _stretched(self.module, scale)
        module = self._made[scale]
        # A copy shares hooks with the module it was made of, and is none of their business.
        return module(hidden, position) if scale == 1 else module.forward(hidden, position)


def _stretched(module: Any, scale: float) -> Any:
    """A shallow copy with slower frequencies."""
    clone = copy.copy(module)
    slower = ops.ntk_frequencies(module.inv_freq, scale)
    clone.__dict__["_buffers"] = OrderedDict(module._buffers, inv_freq=slower)
    return clone


def rotary_of(text_model: Any, adapter: Adapter, cache: Any) -> Rotary | None:
    """The rotary embedding of a language model, stretched as a cache's keys are."""
    module = getattr(text_model, "rotary_emb", None)
    if module is None:
        return None
    scale_B = None if cache is None else cache.layers[0].rotary_B
    return Rotary(module, adapter.mrope, None if scale_B is None else scale_B.tolist())


def plan_rotary(
    recipe: Recipe, adapter: Adapter, model: nn.Module, budget: SampleBudget
) -> StepPlan | None:
    """The method of a recipe that stretches rotary positions, None when there is none.

    Raises:
        AttachmentError: the model chooses its frequencies by itself, or has none.
    """
    found = [i for i in recipe.at("decoder") if overrides(recipe.steps[i].method, "rotary_scale")]
    if not found:
        return None
    method = recipe.steps[found[0]].method
    module: Any = getattr(adapter.language_model(model), "rotary_emb", None)
    kind = getattr(module, "rope_type", "default")
    if not isinstance(kind, str) or kind in _MOVING or not hasattr(module, "inv_freq"):
        raise AttachmentError(
            f"{method.name} stretches the rotary positions of a prompt once; those of this model "
            f"are of the type {kind!r}, which it scales by itself or not by frequencies. "
            f'Use "{method.name}@cache" where only the cache matters.'
        )
    if getattr(adapter.text_config(model), "max_position_embeddings", None) is None:
        raise AttachmentError(f"{method.name}: this model does not say how many positions it has.")
    return StepPlan(found[0], method, frozenset(), budget(found[0]))


def note_frames(report: Report, recipe: Recipe) -> None:
    """Say what became of frames that a method wants to deal out."""
    if any(step.method.interleaves_frames for step in recipe):
        report.notes.append(FRAME_BY_FRAME)


def ask_scale(
    call: DecoderCall, step: StepPlan | None, position_PBL: torch.Tensor, config: Any
) -> None:
    """Fix the scale of every sample for this prompt and all that follows on its cache.

    A cache that holds tokens keeps what it has.
    """
    if step is None:
        return
    assert call.rotary is not None
    asked = []
    for sample, visual in enumerate(call.sequence.visual):
        scale = 1.0
        if visual.num and not step.budget(sample).is_full:
            context = context_of_rule(
                call, step, sample, position_PBL, config.max_position_embeddings
            )
            scale = float(step.method.rotary_scale(context))
            if not 1 <= scale < float("inf"):
                raise ValueError(f"{step.method.name}: rotary_scale must be at least 1: {scale}.")
        asked.append(scale)
    if call.cache is not None and call.cache.get_seq_length():
        known = call.rotary.scale or [1.0] * len(asked)
        if any(new > old for new, old in zip(asked, known, strict=True)):
            call.report.notes.append(
                f"{step.method.name}: the keys in the cache were rotated for positions stretched "
                f"by {max(known):.3g}, so that stays; this prompt would need {max(asked):.3g}."
            )
        return
    if all(scale == 1 for scale in asked):
        return
    call.rotary.scale = asked
    if call.cache is not None:
        # On the CPU, so that decoding steps read it without waiting for the device.
        scale_B = torch.tensor(asked, dtype=torch.float64)
        for layer in call.cache.layers:
            assert isinstance(layer, ReducedLayer)
            layer.rotary_B = scale_B
