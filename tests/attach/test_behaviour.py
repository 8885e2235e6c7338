"""What every registered method must do on every model: results, counts and provenance.

Legend: B samples, L padded tokens, S tokens of a sample, N tokens of an item, D channels.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from attach_suite import (
    QUICK,
    TOLERANCE,
    attach,
    batch_of,
    behaviour,
    chosen,
    elsewhere,
    greedy,
    logits_of,
    model_of,
    one_of,
    same_steps,
    samples_of,
    spied,
    untouched,
)
from method_table import METHOD_TABLE

import foveate
from foveate.core import Budget, Recipe, get_method, list_methods
from foveate.errors import AttachmentError
from foveate.models.registry import adapter_for
from matrix_record import note
from tiny import PACKED, Sample, tiny_inputs, tiny_modalities


def test_every_method_has_a_row():
    assert set(list_methods()) == set(METHOD_TABLE)
    for name, row in METHOD_TABLE.items():
        (step,) = Recipe.of(row.recipe)
        assert (step.method.name, step.stages) == (name, row.stages)


@behaviour("retain=1.0 is the untouched model, bit by bit", quick=QUICK)
def test_keeping_all_is_the_untouched_model(name, family):
    model, inputs = model_of(family), batch_of(family)
    expected, ids = untouched(family)
    with attach(name, model, retain=1.0) as run:
        assert not run.active
        assert torch.equal(logits_of(model, inputs), expected)
        out = greedy(model, inputs, 3)
    assert torch.equal(out.sequences, ids)
    assert type(out.past_key_values.layers[0]).__name__ == "DynamicLayer"


@behaviour("acts: fewer tokens, or other attention", quick=QUICK)
def test_the_method_acts(name, family, request):
    """At which stages, for images and for videos: a method that does nothing is found here."""
    model, row, acted = model_of(family), METHOD_TABLE[name], {}
    for modality in tiny_modalities(family):
        inputs = tiny_inputs(family, samples=(Sample(items=(modality,), seed=0),))
        before = greedy(model, inputs, 2).logits
        with attach(name, model) as run:
            after = greedy(model, inputs, 2).logits  # the second token knows of the cache stage
            report = run.report
        stages = [stage.stage for stage in report.stages if sum(stage.after) < sum(stage.before)]
        changed = not all(map(torch.equal, before, after))
        assert changed == bool(stages or not row.reduces)
        acted[modality] = list(dict.fromkeys(stages)) if row.reduces else list(row.stages)
        if row.reduces and (row.on_images or {item.modality for item in report.items} == {"video"}):
            expected = set(get_method(name).reducing_stages()) & set(row.stages)
            expected -= {"frames"}  # tensors come behind it
            if family in PACKED and get_method(name).encoder_optional:
                expected -= {"encoder"}
            assert set(stages) == expected
    note(request, acted=acted)
    assert any(acted.values())


@elsewhere("acts: fewer tokens, or other attention")
def test_other_families_are_refused_or_left_as_they_are(name, family, request):
    model, inputs = model_of(family), batch_of(family)
    try:
        with attach(name, model) as run:
            logits = logits_of(model, inputs)
    except AttachmentError as error:
        note(request, refused=str(error))
    else:
        assert run.report.visual_after == run.report.visual_before > 0
        assert torch.equal(logits, untouched(family)[0])
        note(request, acted={modality: [] for modality in tiny_modalities(family)})
    assert torch.equal(logits_of(model, inputs), untouched(family)[0])


@pytest.mark.parametrize("family", PACKED)
def test_encoder_methods_refuse_packed_encoders(family):
    model = model_of(family)
    with pytest.raises(AttachmentError, match="packs all images into one row"):
        attach("tome", model)
    assert torch.equal(logits_of(model, batch_of(family)), untouched(family)[0])


@behaviour("a batch padded on the left: greedy generation as alone", quick=QUICK)
def test_padded_batch_equals_single_samples(name, family):
    model = model_of(family)
    with attach(name, model) as run:
        together = greedy(model, batch_of(family))
        counts = [(item.sample, item.after) for item in run.report.items]
        for row in range(3):
            alone = greedy(model, one_of(family, row))
            same_steps(together, row, alone)
            if row < 2:
                assert [after for s, after in counts if s == row] == [
                    item.after for item in run.report.items
                ]


@behaviour("a batch padded on the right: logits as alone")
def test_right_padding_equals_single_samples(name, family):
    """After a reduction the padding is on the left: the last column is every row's last token."""
    model, inputs = model_of(family), batch_of(family, "right")
    with attach(name, model):
        together = logits_of(model, inputs)
        for row in range(3):
            alone = logits_of(model, one_of(family, row))[0, -1]
            moved = together.shape[1] < inputs["input_ids"].shape[1]
            last = -1 if moved else int(inputs["attention_mask"][row].sum()) - 1
            torch.testing.assert_close(together[row, last], alone, atol=TOLERANCE, rtol=0)


def entering(family: str, name: str | None) -> tuple[dict, foveate.Attachment | None]:
    """What the text model is given for the batch, untouched or under a method."""
    model = model_of(family)
    if name is None:
        with spied(model) as seen:
            logits_of(model, batch_of(family))
        return seen, None
    with attach(name, model) as run, spied(model) as seen:
        logits_of(model, batch_of(family))
    return seen, run


def visual_rows(family: str, sample: int, items: list) -> list[torch.Tensor]:
    """Rows of every item of a sample in the incoming prompt, from the placeholders."""
    ids = batch_of(family)["input_ids"][sample]
    tokens = adapter_for(model_of(family)).placeholder_ids(model_of(family))
    rows = {modality: (ids == token).nonzero()[:, 0] for modality, token in tokens.items()}
    found = []
    for item in items:
        found.append(rows[item.modality][: item.before])
        rows[item.modality] = rows[item.modality][item.before :]
    return found


def expected_prompt(family: str, sample: int, items: list, embeds_LD: torch.Tensor):
    """The shortened prompt of a sample, from its report alone; and which rows are averages.

    Outputs of a run of placeholders keep the method's order, runs keep the prompt's.
    """
    valid_L = batch_of(family)["attention_mask"][sample].bool()
    keys, parts, exact = [], [], []
    text_L = valid_L.clone()
    for rows_N, item in zip(visual_rows(family, sample, items), items, strict=True):
        text_L[rows_N] = False
        x_ND, anchor_M = embeds_LD[rows_N], torch.arange(item.before)
        if item.reduction is not None:
            made = item.reduction.features_BMD  # synthesised tokens are no sums of others
            x_ND = (item.reduction.matrix() @ x_ND)[0] if made is None else made[0]
            anchor_M = item.reduction.anchor_BM[0]
        first_N = [rows_N[0]]
        for before, row in pairwise(rows_N):
            first_N.append(first_N[-1] if row == before + 1 else row)
        keys += [int(first_N[int(a)]) for a in anchor_M]
        parts.append(x_ND)
        merged = item.reduction is not None and item.reduction.kind != "select"
        exact += [not merged] * len(anchor_M)
    text = text_L.nonzero()[:, 0]
    keys += text.tolist()
    exact += [True] * len(text)
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return torch.cat([*parts, embeds_LD[text]])[order], torch.tensor(exact)[order]


@behaviour("what enters the LLM is what the report says, token by token", quick=QUICK)
def test_counts_and_provenance(name, family):
    """What entered the language model is what the report says, token by token."""
    row, method = METHOD_TABLE[name], next(iter(Recipe.of(METHOD_TABLE[name].recipe))).method
    before, _ = entering(family, None)
    after, run = entering(family, name)
    assert run is not None and run.report.visual_before > 0
    for item in run.report.items:
        counted = method.count(item.grid, Budget(retain=row.retain))
        assert item.after <= counted.tokens
        assert item.after == counted.tokens or not counted.exact
        assert counted.exact or not row.exact
        if item.reduction is not None:
            group_N = item.reduction.groups_BN[0]
            fed = set(group_N[group_N >= 0].tolist())
            if item.reduction.kind not in ("select", "merge"):
                # A token may feed several others, and another one most.
                fed = set(item.reduction.matrix()[0].abs().sum(1).nonzero()[:, 0].tolist())
            assert fed == set(range(item.after))
        acts = "projector" in row.stages and (row.on_images or item.modality == "video")
        assert (item.after < item.before) == acts
    if {"patches", "encoder"} & set(row.stages):
        return  # the features differ before the prompt is assembled; see test_encoder_stage.py
    for sample in range(len(samples_of(family))):
        items = [item for item in run.report.items if item.sample == sample]
        embeds_LD = before["inputs_embeds"][sample]
        expected_SD, exact_S = expected_prompt(family, sample, items, embeds_LD)
        got_SD = after["inputs_embeds"][sample, -len(expected_SD) :]
        assert torch.equal(got_SD[exact_S], expected_SD[exact_S])
        torch.testing.assert_close(got_SD, expected_SD, atol=1e-5, rtol=0)
        assert run.report.prompt_lengths[sample] == len(expected_SD)


@behaviour("tokens leave layers and caches for good, none is only masked", quick=QUICK)
def test_later_stages_report_what_they_removed(name, family):
    row = METHOD_TABLE[name]
    model, inputs = model_of(family), one_of(family)
    with attach(name, model) as run:
        cache = model(**inputs).past_key_values
    report = run.report
    text = report.prompt_lengths[0] - report.visual_after
    for stage in report.stages:
        if stage.stage == "decoder":
            assert report.layer_lengths[0][stage.layer] == text + stage.after[0]
            alive = [item.alive[stage.layer].tolist() for item in report.items]
            assert sum(map(len, alive)) == stage.after[0]
            for targets, item in zip(alive, report.items, strict=True):
                assert targets == sorted(set(targets) & set(range(item.after)))
    stages = {stage.stage for stage in report.stages}
    family_items = {item.modality for item in report.items}
    reduces = get_method(name).reducing_stages()
    if "decoder" in reduces and (row.on_images or "video" in family_items):
        assert "decoder" in stages and report.layer_lengths[0][-1] < report.layer_lengths[0][0]
    if "cache" in reduces:
        assert "cache" in stages and report.cache_lengths[0][-1] < report.layer_lengths[0][-1]
    # Nothing is only masked: the slots themselves are gone, and none of them is padding.
    assert [layer.keys.shape[-2] for layer in cache.layers] == report.cache_lengths[0]
    assert all(layer.valid_BT is None for layer in cache.layers if hasattr(layer, "valid_BT"))


@behaviour("equal seeds give equal results")
def test_runs_repeat(name, family):
    model, inputs = model_of(family), batch_of(family)
    results = []
    for seed in (0, 0, 1):
        with attach(name, model, seed=seed):
            results.append(logits_of(model, inputs)[:, -1])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2]) == (name != "random")


@behaviour("bfloat16")
def test_bfloat16(name, family):
    kept = []
    for dtype in (torch.float32, torch.bfloat16):
        model = model_of(family, dtype)
        inputs = {
            key: value.to(dtype) if value.is_floating_point() else value
            for key, value in batch_of(family).items()
        }
        with attach(name, model) as run:
            logits = logits_of(model, inputs)
        assert logits.dtype == dtype and torch.isfinite(logits).all()
        kept.append((chosen(run), run.report.as_dict()["layer_lengths"]))
    (full, lengths), (half, half_lengths) = kept
    if name in ("holitom", "hiprune", "quota", "f2c"):
        # Thresholds, neighbourhoods that meet, or floors of shares on rounded features: how many is
        # their affair.
        return
    assert lengths == half_lengths
    if name in ("random", "uniform", "pool", "fastv", "quickvideo"):
        assert full == half
    if name == "fastervlm":
        overlap = [len(a & b) / len(a) for a, b in zip(full, half, strict=True)]
        assert min(overlap) >= 0.7


@behaviour("eager attention: the same as sdpa")
def test_eager_equals_sdpa(name, family):
    """Nor does a method that reads attention switch the model to eager."""
    found = []
    for attn in ("sdpa", "eager"):
        model = model_of(family, attn=attn)
        with attach(name, model) as run:
            out = greedy(model, batch_of(family), 3)
        assert model.config._attn_implementation == attn
        found.append((out, chosen(run), run.report.as_dict()["layer_lengths"]))
    (sdpa, kept, lengths), (eager, eager_kept, eager_lengths) = found
    assert eager_kept == kept and eager_lengths == lengths
    for row in range(3):
        same_steps(sdpa, row, eager, row, atol=1e-4)  # two orders of summation in every layer


@behaviour("several images and videos in one prompt")
def test_images_and_videos_in_one_sample(name, family):
    kinds = ("image", tiny_modalities(family)[-1], "image")
    sample = Sample(text=(2, 3, 1, 4), items=kinds, seed=3)
    model, inputs = model_of(family), tiny_inputs(family, samples=(sample,))
    with attach(name, model) as run:
        mixed = logits_of(model, inputs)[0, -1]
        items = run.report.items
        if "video" in {item.modality for item in items}:
            assert [item.modality for item in items] == list(kinds)
        # An item's own tokens are chosen as if it were alone, whatever stands beside it.
        assert torch.isfinite(mixed).all()
        together = tiny_inputs(family, samples=(sample, Sample(seed=4)))
        torch.testing.assert_close(logits_of(model, together)[0, -1], mixed, atol=TOLERANCE, rtol=0)
