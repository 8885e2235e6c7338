"""Attention rules during a call: asked once per prompt, then read for whatever tokens are left.

A rule speaks of tokens by their stable numbers, so that every later reduction, parking and padding
only has to look up what is said of the tokens that are there.

Legend: B batch, L padded length, S tokens of a sample, T cached slots, P rows of position ids,
d head channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from foveate.attach.cache import move_positions
from foveate.attach.noting import sample_notebook
from foveate.attach.plan import StepPlan
from foveate.attach.sequence import Sequence
from foveate.core import AttentionRule, Recipe, RuleContext
from foveate.core.method import overrides
from foveate.errors import AttachmentError
from foveate.models.rotary import project_text_k, project_text_qk

if TYPE_CHECKING:
    from foveate.attach.decoder import DecoderCall
    from foveate.attach.plan import SampleBudget

#: (cos, sin), each [.., B or 1, L, d].
Embeddings = tuple[torch.Tensor, torch.Tensor]
#: Attention implementations whose masks and positions a rule can change.
_KERNELS = ("sdpa", "eager")


def plan_rules(recipe: Recipe, config: Any, budget: SampleBudget) -> list[StepPlan]:
    """The methods of a recipe that change attention.

    Raises:
        AttachmentError: the model's attention kernel takes no masks of its own.
    """
    plans, attention = [], config._attn_implementation
    for index in recipe.at("decoder"):
        method = recipe.steps[index].method
        if not overrides(method, "attention_rule"):
            continue
        if attention not in _KERNELS:
            raise AttachmentError(
                f"{method.name} changes which tokens attend to which, which the attention "
                f'{attention!r} cannot do. Load the model with attn_implementation="sdpa".'
            )
        plans.append(StepPlan(index, method, frozenset(), budget(index)))
    return plans


@dataclass(eq=False)
class CallRules:
    """The rules of one call, one per sample (None: as the model has it)."""

    rules: list[AttentionRule | None]
    _made: dict[tuple[str, int], tuple[Sequence, torch.Tensor | None]] = field(default_factory=dict)

    def unrotated_BL(self, sequence: Sequence) -> torch.Tensor | None:
        """Present columns whose keys stay unrotated, bool [B, L]; None when there are none."""
        return self._of("unrotated_S", sequence)

    def visible_BLL(self, sequence: Sequence) -> torch.Tensor | None:
        """Which present row sees which present key, bool [B, L, L]; None when all is causal."""
        return self._of("visible_SS", sequence)

    def _of(self, name: str, sequence: Sequence) -> torch.Tensor | None:
        # Layers between two reductions share the sequence, and with it one tensor.
        key = (name, id(sequence))
        if key not in self._made:
            parts = [None if rule is None else getattr(rule, name) for rule in self.rules]
            found = None if all(part is None for part in parts) else _spread(parts, sequence)
            self._made[key] = (sequence, found)
        return self._made[key][1]


def _spread(parts: list[torch.Tensor | None], sequence: Sequence) -> torch.Tensor:
    """What rules say of token numbers as what they say of the present columns."""
    some = next(part for part in parts if part is not None)
    length, device = sequence.length, some.device
    blank = torch.zeros(length, dtype=torch.bool, device=device)
    if some.dim() == 2:
        blank = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    out = blank.repeat(len(parts), *[1] * blank.dim())
    for sample, part in enumerate(parts):
        if part is None:
            continue
        rows_S, ids_S = sequence.rows(sample, device), sequence.ids[sample]
        if part.dim() == 1:
            out[sample, rows_S] = part[ids_S]
        else:
            out[sample, rows_S[:, None], rows_S] = part[ids_S[:, None], ids_S]
    return out


def ask_rules(call: DecoderCall, steps: list[StepPlan], position_PBL: torch.Tensor) -> torch.Tensor:
    """Ask the methods for their rules and put them into the call; later tokens move in the cache.

    Returns:
        Position ids [P, B, L] under the rules.

    Raises:
        AttachmentError: two methods number the tokens.
    """
    rules: list[AttentionRule | None] = []
    for sample, visual in enumerate(call.sequence.visual):
        rule = None
        for step in steps:
            if visual.num and not step.budget(sample).is_full:
                asked = step.method.attention_rule(
                    context_of_rule(call, step, sample, position_PBL)
                )
                rule = _joined(rule, asked, step, call.sequence.ids[sample].shape[0])
        rules.append(rule)
    if all(rule is None for rule in rules):
        return position_PBL
    call.rules = CallRules(rules)
    shifts = [None if rule is None else rule.shift_S for rule in rules]
    if all(shift is None for shift in shifts):
        return position_PBL
    for step in call.decoder_steps:
        if step.renumbers:
            raise AttachmentError(
                f"{step.method.name} numbers the tokens anew in the middle of the decoder, which "
                "would undo the position ids of an attention rule: use one of the two."
            )
    position_PBL = position_PBL.clone()
    moved_B = torch.zeros(len(rules), dtype=torch.long, device=position_PBL.device)
    for sample, shift_S in enumerate(shifts):
        if shift_S is None:
            continue
        shift_S = shift_S.to(position_PBL.device)
        position_PBL[:, sample, call.sequence.rows(sample, position_PBL.device)] -= shift_S
        moved_B[sample] = shift_S[-1]
    if call.cache is not None:
        move_positions(call.cache, moved_B)
    return position_PBL


def context_of_rule(
    call: DecoderCall, step: StepPlan, sample: int, position_PBL: torch.Tensor, window: int = 0
) -> RuleContext:
    """The prompt of one sample as it enters the language model."""
    visual = call.sequence.visual[sample]
    rows_S = call.sequence.rows(sample, visual.rows_N.device)
    return RuleContext(
        budget=step.budget(sample),
        method=step.method.name,
        seed=call.seed,
        state=call.states[step.number, sample],
        sample=sample // call.repeats,
        num_layers=call.num_layers,
        visual_N=torch.searchsorted(rows_S, visual.rows_N),
        column_S=call.columns[sample],
        num_columns=call.num_columns[sample],
        position_PS=position_PBL[:, sample, rows_S],
        window=window,
        notebook=sample_notebook(call, "decoder", None, sample),
    )


def _joined(
    one: AttentionRule | None, other: AttentionRule | None, step: StepPlan, num_tokens: int
) -> AttentionRule | None:
    """Both rules at once: a key must be visible in both, and is unrotated when one says so."""
    if other is None or other.is_empty:
        return one
    if other.num_tokens != num_tokens:
        raise ValueError(
            f"{step.method.name}: its attention rule speaks of {other.num_tokens} tokens, the "
            f"sample has {num_tokens}."
        )
    if one is None:
        return other
    if one.shift_S is not None and other.shift_S is not None:
        raise AttachmentError(
            f"{step.method.name} and a method before it both number the tokens; a recipe can have "
            "one such method."
        )
    visible = [r.visible_SS for r in (one, other) if r.visible_SS is not None]
    unrotated = [r.unrotated_S for r in (one, other) if r.unrotated_S is not None]
    return AttentionRule(
        visible_SS=visible[0] & visible[-1] if visible else None,
        shift_S=other.shift_S if one.shift_S is None else one.shift_S,
        unrotated_S=unrotated[0] | unrotated[-1] if unrotated else None,
    )


@dataclass(frozen=True, eq=False)
class RuleOfRows:
    """What rules say of the tokens of one sample that a layer sees.

    Attributes:
        unrotated_S: bool [S] of the tokens of this call, or None.
        unrotated_T: bool [T] of what is cached from earlier calls, or None.
        visible_SS: bool [S, S], or None.
        scaling: what the model multiplies cos and sin with.
    """

    unrotated_S: torch.Tensor | None = None
    unrotated_T: torch.Tensor | None = None
    visible_SS: torch.Tensor | None = None
    scaling: float = 1.0

    @property
    def mixed(self) -> bool:
        """Whether some keys are unrotated: queries and keys then have twice the channels, so that
        one product gives the logits of both kinds."""
        return self.unrotated_S is not None or self.unrotated_T is not None

    def queries(self, module: nn.Module, raw: torch.Tensor, embeddings: Embeddings) -> torch.Tensor:
        """Queries [1, H, R, d or 2 d] from what `q_proj` gave."""
        rotated, _ = project_text_qk(module, raw, None, embeddings)
        if not self.mixed:
            return rotated
        plain, _ = project_text_qk(module, raw, None, unrotated(embeddings, self.scaling))
        return torch.cat([rotated, plain], dim=-1)

    def keys(self, module: nn.Module, raw: torch.Tensor, embeddings: Embeddings) -> torch.Tensor:
        """Keys [1, G, S, d or 2 d] from what `k_proj` gave."""
        rotated = project_text_k(module, raw, embeddings)
        if self.unrotated_S is not None:
            plain = project_text_k(module, raw, unrotated(embeddings, self.scaling))
            rotated = rotated.where(~self.unrotated_S[:, None], plain)
        return self._sided(rotated, self.unrotated_S)

    def past(self, keys_1GTd: torch.Tensor) -> torch.Tensor:
        """Cached keys [1, G, T, d or 2 d]."""
        return self._sided(keys_1GTd, self.unrotated_T)

    def _sided(self, keys: torch.Tensor, flags: torch.Tensor | None) -> torch.Tensor:
        """Rotated keys in the first d channels, unrotated ones in the last."""
        if not self.mixed:
            return keys
        if flags is None:
            return torch.nn.functional.pad(keys, (0, keys.shape[-1]))
        flags = flags[:, None]
        return torch.cat([keys.masked_fill(flags, 0), keys.masked_fill(~flags, 0)], dim=-1)


def rule_of_rows(
    call: DecoderCall, layer: int, sample: int, rows_S: torch.Tensor, num_past: int
) -> RuleOfRows:
    """What rules say of one sample's present tokens `rows_S` and of what a layer has cached."""
    unrotated_BL = visible_BLL = None
    if call.rules is not None:
        unrotated_BL = call.rules.unrotated_BL(call.sequence)
        visible_BLL = call.rules.visible_BLL(call.sequence)
    cached, past_T = call.layer_cache(layer), None
    if num_past and cached is not None and cached.unrotated_BT is not None:
        past_T = cached.unrotated_BT[sample, :num_past]
        if cached.valid_BT is not None:
            past_T = past_T[cached.valid_BT[sample, :num_past]]
    return RuleOfRows(
        None if unrotated_BL is None else unrotated_BL[sample, rows_S],
        past_T,
        None if visible_BLL is None else visible_BLL[sample][rows_S[:, None], rows_S],
        rotary_scaling(call),
    )


def rotary_scaling(call: DecoderCall) -> float:
    """What the model's rotary embedding multiplies cos and sin with (1 but for some long ones)."""
    return float(getattr(call.rotary, "attention_scaling", 1.0))


def unrotated(embeddings: Embeddings, scaling: float) -> Embeddings:
    """(cos, sin) that turn nothing, in the shape and scale of those given."""
    cos, sin = embeddings
    return torch.full_like(cos, scaling), torch.zeros_like(sin)
