"""The cache stage: keys and values of visual tokens leave a layer after its attention has run.

Legend: B batch, G key heads, T cached slots, N visual tokens of a sample, d head channels.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from foveate.attach.cache import ReducedLayer
from foveate.attach.evidence import places
from foveate.attach.noting import sample_notebook
from foveate.attach.plan import StepPlan, placed
from foveate.attach.sequence import Layout, Sequence
from foveate.core import CacheContext, Reduction, StageReport

if TYPE_CHECKING:
    from foveate.attach.decoder import DecoderCall


def reduce_cache(call: DecoderCall, step: StepPlan, layer: int) -> None:
    """Let a cache-stage method thin out what one layer has just cached."""
    cached = call.layer_cache(layer)
    if cached is None:
        return
    if step.method.one_cache_choice:
        _reduce_all(call, step, layer, cached)
        return
    begin = time.perf_counter()
    device = cached.kv[0].device
    num_past = cached.length - call.sequence.length
    keep_all = []
    before, after, touched = [], [], False
    for sample, visual in enumerate(call.sequence.visual):
        keep_T = torch.ones(cached.length, dtype=torch.bool, device=device)
        if cached.valid_BT is not None:
            keep_T &= cached.valid_BT[sample]
        reduction = _ask(call, step, layer, sample, cached, num_past)
        before.append(visual.num)
        after.append(visual.num)
        if reduction is not None:
            touched = True
            slots_N = visual.rows_N + num_past
            slots_M = slots_N[reduction.anchor_BM[0]]
            if reduction.kind != "select":
                for store in cached.kv:
                    visual_1NGd = store[sample : sample + 1, :, slots_N].transpose(1, 2)
                    store[sample, :, slots_M] = reduction.apply(visual_1NGd)[0].transpose(0, 1)
            keep_T[slots_N] = False
            keep_T[slots_M] = True
            after[-1] = slots_M.shape[0]
        keep_all.append(keep_T)
    if touched:
        if call.mask_only:
            cached.valid_BT = torch.stack(keep_all)
        else:
            layout = Layout([keep_T.nonzero()[:, 0] for keep_T in keep_all])
            cached.keep(layout.index_BL(), layout.valid_BL())
        call.report.stages.append(
            StageReport("cache", step.method.name, tuple(before), tuple(after), layer)
        )
    call.report.spend("cache", time.perf_counter() - begin)


def _reduce_all(call: DecoderCall, step: StepPlan, layer: int, cached: ReducedLayer) -> None:
    """Let a method look at one layer and, behind the last one, thin out all of them alike."""
    begin = time.perf_counter()
    num_past = cached.length - call.sequence.length
    chosen = [
        _ask(call, step, layer, sample, cached, num_past)
        for sample in range(len(call.sequence.visual))
    ]
    if layer < call.num_layers - 1:
        chosen = []
    if any(reduction is not None for reduction in chosen):
        kept = [_kept_ids(call, step, sample, made) for sample, made in enumerate(chosen)]
        for earlier, sequence in enumerate(call.sequences):
            _keep_ids(call, step, earlier, sequence, kept)
    call.report.spend("cache", time.perf_counter() - begin)


def _kept_ids(
    call: DecoderCall, step: StepPlan, sample: int, reduction: Reduction | None
) -> torch.Tensor | None:
    """Stable numbers of the visual tokens that stay, None for all."""
    if reduction is None:
        return None
    if reduction.kind != "select":
        raise ValueError(
            f"{step.method.name} chooses for all layers at once and must select tokens; it "
            f"returned a reduction of the kind {reduction.kind!r}."
        )
    return _visual_ids(call.sequence, sample)[reduction.anchor_BM[0]]


def _visual_ids(sequence: Sequence, sample: int) -> torch.Tensor:
    rows_N = sequence.visual[sample].rows_N
    rows_S = sequence.rows(sample, rows_N.device)
    return sequence.ids[sample][torch.searchsorted(rows_S, rows_N)]


def _keep_ids(
    call: DecoderCall,
    step: StepPlan,
    layer: int,
    sequence: Sequence,
    kept: list[torch.Tensor | None],
) -> None:
    """Keep the visual slots of one layer whose tokens are among those that stay."""
    cached = call.layer_cache(layer)
    assert cached is not None
    num_past = cached.length - sequence.length
    keep_BT = torch.ones(len(kept), cached.length, dtype=torch.bool, device=cached.kv[0].device)
    if cached.valid_BT is not None:
        keep_BT &= cached.valid_BT
    before = [visual.num for visual in sequence.visual]
    after = list(before)
    for sample, ids_M in enumerate(kept):
        if ids_M is not None:
            stays_N = torch.isin(_visual_ids(sequence, sample), ids_M)
            keep_BT[sample, sequence.visual[sample].rows_N + num_past] = stays_N
            after[sample] = int(stays_N.sum())
    if call.mask_only:
        cached.valid_BT = keep_BT
    else:
        layout = Layout([keep_T.nonzero()[:, 0] for keep_T in keep_BT])
        cached.keep(layout.index_BL(), layout.valid_BL())
    call.report.stages.append(
        StageReport("cache", step.method.name, tuple(before), tuple(after), layer)
    )


def _ask(
    call: DecoderCall, step: StepPlan, layer: int, sample: int, cached: ReducedLayer, num_past: int
) -> Reduction | None:
    visual = call.sequence.visual[sample]
    budget = step.budget(sample)
    if visual.num == 0 or budget.is_full:
        return None
    slots_N = visual.rows_N + num_past
    ids_S = call.sequence.ids[sample]
    visual_N = torch.searchsorted(call.sequence.rows(sample, ids_S.device), visual.rows_N)
    id_N = ids_S[visual_N]

    def last_token_attention(earlier: int) -> torch.Tensor:
        if earlier not in call.attentions:
            raise ValueError(
                f"{step.method.name} reads the attention of layer {earlier} at layer {layer}: "
                "return it from attention_layers(), and read it before two later layers have run."
            )
        seen = call.attentions[earlier]
        row_S = seen.view(sample).last_row()[0].mean(0)
        return row_S[places(seen.ids[sample], id_N)]

    context = CacheContext(
        budget=budget,
        method=step.method.name,
        seed=call.seed,
        state=call.states[step.number, sample],
        layer=layer,
        num_layers=call.num_layers,
        position_N3=visual.position_N3,
        item_N=visual.item_N,
        id_N=id_N,
        last_token_attention=last_token_attention,
        attention=lambda: call.attentions[layer].view(sample),
        sample=sample // call.repeats,
        visual_N=visual_N,
        column_S=call.columns[sample][ids_S],
        num_columns=call.num_columns[sample],
        notebook=sample_notebook(call, "cache", layer, sample),
    )
    with torch.no_grad():
        keys_BGNd, values_BGNd = (x[sample : sample + 1, :, slots_N] for x in cached.kv)
        reduction = step.method.cache(keys_BGNd, values_BGNd, context)
    return placed(reduction, step.method, keys_BGNd.device)
