"""What a decoder-stage method may read of the language model: computed when it asks, not before.

Legend: B batch, L padded length, N visual tokens of a sample, S all tokens of a sample, R some of
them, I visual items of a sample, D channels, H query heads, G key heads, d head channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from foveate.attach.layer_attention import ahead_view, embeddings_of_rows, past_of, rows_of
from foveate.attach.noting import sample_notebook
from foveate.attach.plan import StepPlan
from foveate.attach.rules import rule_of_rows
from foveate.attach.sequence import Sequence
from foveate.core import AttentionView, DecoderContext, LayerModule, ModuleContext, Tokens

if TYPE_CHECKING:
    from foveate.attach.decoder import DecoderCall


def context_of(
    call: DecoderCall, step: StepPlan, layer: int, sample: int, hidden_BLD: torch.Tensor
) -> DecoderContext:
    """What one method reads before one layer, for one sample."""
    visual, ids = call.sequence.visual[sample], call.sequence.ids[sample]
    rows_S = call.sequence.rows(sample, hidden_BLD.device)

    def observed(earlier: int, module: LayerModule) -> torch.Tensor:
        found = call.observed.get((step.number, earlier, module, sample))
        if found is None:
            raise ValueError(
                f"{step.method.name} observed nothing of the {module} of layer {earlier}; name the "
                "layer in observe_layers() and return one value per token from observe()."
            )
        seen, value_S = found
        place_S = places(seen, ids)
        out_S = value_S[place_S.clamp(min=0)]
        missing_S = (place_S < 0).view(-1, *[1] * (out_S.dim() - 1))
        return out_S.masked_fill(missing_S, torch.nan) if out_S.is_floating_point() else out_S

    return DecoderContext(
        budget=step.budget(sample),
        method=step.method.name,
        seed=call.seed,
        state=call.states[step.number, sample],
        layer=layer,
        num_layers=call.num_layers,
        num_visual=call.num_visual[sample],
        modalities=frozenset(item.modality for item in call.items[sample]),
        num_text=rows_S.shape[0] - visual.num,
        visual_N=torch.searchsorted(rows_S, visual.rows_N),
        attention=lambda earlier: call.attentions[earlier].view(sample),
        survivors=lambda earlier: places(call.attentions[earlier].ids[sample], ids),
        attention_ahead=lambda: _ahead(call, layer, sample, rows_S, hidden_BLD),
        hidden=lambda: rows_of(hidden_BLD, sample, rows_S),
        observed=observed,
        carried=lambda name: _carried(call, step, sample, name),
        id_S=ids,
        span_I2=call.spans[sample],
        notebook=sample_notebook(call, "decoder", layer, sample),
        stages=step.stages,
    )


def tokens_of(call: DecoderCall, sample: int, hidden_BLD: torch.Tensor) -> Tokens:
    """The present visual tokens of a sample, [1, N, D]."""
    visual = call.sequence.visual[sample]
    return Tokens(
        hidden_BLD[sample : sample + 1, visual.rows_N],
        position_BN3=visual.position_N3[None],
        kind_BN=visual.kind_N[None],
    )


def observe(
    call: DecoderCall,
    layer: int,
    module: LayerModule,
    input_BLD: torch.Tensor,
    output_BLD: torch.Tensor,
) -> None:
    """Show a module's input and output to the methods that asked for that layer."""
    for step in call.decoder_steps:
        if layer not in step.observes:
            continue
        for sample, visual in enumerate(call.sequence.visual):
            budget = step.budget(sample)
            if visual.num == 0 or budget.is_full:
                continue
            rows_S = call.sequence.rows(sample, input_BLD.device)
            context = ModuleContext(
                budget=budget,
                method=step.method.name,
                seed=call.seed,
                state=call.states[step.number, sample],
                layer=layer,
                num_layers=call.num_layers,
                module=module,
                num_visual=call.num_visual[sample],
                visual_N=torch.searchsorted(rows_S, visual.rows_N),
                notebook=sample_notebook(call, "decoder", layer, sample),
            )
            with torch.no_grad():
                value_S = step.method.observe(
                    rows_of(input_BLD, sample, rows_S), rows_of(output_BLD, sample, rows_S), context
                )
            if value_S is None:
                continue
            if value_S.shape[:1] != rows_S.shape:
                raise ValueError(
                    f"{step.method.name}: observe() returns one value per token, [S, ...] with "
                    f"S = {rows_S.shape[0]}, got {tuple(value_S.shape)}."
                )
            key = (step.number, layer, module, sample)
            call.observed[key] = (call.sequence.ids[sample], value_S)


def item_spans(sequence: Sequence) -> list[torch.Tensor]:
    """Places of the first and last token of every item that has some, int64 [I, 2] per sample."""
    spans = []
    for sample, visual in enumerate(sequence.visual):
        rows_S = sequence.rows(sample, visual.rows_N.device)
        place_N = torch.searchsorted(rows_S, visual.rows_N)
        # Items stand one after the other, so their tokens are runs; an item may have none left.
        count_I = visual.item_N.bincount() if visual.num else visual.item_N
        count_I = count_I[count_I > 0]
        last_I = count_I.cumsum(0) - 1
        spans.append(torch.stack([place_N[last_I + 1 - count_I], place_N[last_I]], dim=1))
    return spans


def places(seen_S: torch.Tensor, present_S: torch.Tensor) -> torch.Tensor:
    """Where the tokens numbered `present_S` are among `seen_S` (ascending); -1: nowhere."""
    place_S = torch.searchsorted(seen_S, present_S).clamp(max=seen_S.shape[0] - 1)
    return place_S.where(seen_S[place_S] == present_S, -1)


def _ahead(
    call: DecoderCall, layer: int, sample: int, rows_S: torch.Tensor, hidden_BLD: torch.Tensor
) -> AttentionView:
    """Attention of the layer about to run over the present tokens of a sample."""
    modules, cached = call.modules[layer], call.layer_cache(layer)
    num_past = 0 if cached is None else cached.length
    with torch.no_grad():
        return ahead_view(
            modules.attention,
            modules.norm(rows_of(hidden_BLD, sample, rows_S)),
            embeddings_of_rows(call.embeddings_of(layer, hidden_BLD), sample, rows_S),
            past_of(cached, sample, num_past),
            torch.searchsorted(rows_S, call.sequence.visual[sample].rows_N),
            rule_of_rows(call, layer, sample, rows_S, num_past),
        )


def _carried(call: DecoderCall, step: StepPlan, sample: int, name: str) -> torch.Tensor:
    """What a method's projector stage noted for the present visual tokens of a sample."""
    key, visual = (step.number, name), call.sequence.visual[sample]
    items = call.items[sample]
    missing = [number for number, item in enumerate(items) if key not in item.carried]
    if missing:
        raise ValueError(
            f"{step.method.name} carries no {name!r} from the projector stage for item "
            f"{missing[0]} of sample {sample}; that stage calls context.carry({name!r}, ...) for "
            "every item, and must be part of the recipe."
        )
    values = [item.carried[key] for item in items]
    first_I = torch.tensor([0, *(value.shape[0] for value in values)]).cumsum(0)
    first_I = first_I.to(visual.rows_N.device)
    return torch.cat(values)[first_I[visual.item_N] + visual.target_N]
