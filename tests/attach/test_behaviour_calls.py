"""Every registered method under every way of calling a model: searches, turns, budgets, inputs."""

from __future__ import annotations

import pytest
import torch
from attach_suite import (
    TOLERANCE,
    attach,
    batch_of,
    behaviour,
    chosen,
    greedy,
    logits_of,
    model_of,
    one_of,
    same_steps,
    samples_of,
    spied,
)
from method_table import METHOD_TABLE

import foveate
from foveate.core import Recipe
from foveate.errors import AttachmentError
from foveate.models.registry import adapter_for
from matrix_record import note
from tiny import Sample, tiny_inputs


@behaviour("sampling, two replies per prompt")
def test_sampling_repeats_with_the_seed(name, family):
    model, inputs = model_of(family), batch_of(family)
    drawn = []
    with attach(name, model):
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            settings = {"do_sample": True, "num_return_sequences": 2, "temperature": 4.0}
            drawn.append(greedy(model, inputs, **settings).sequences)
    assert drawn[0].shape[0] == 6
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@behaviour("beam search of a batch as alone")
def test_beams_of_a_batch_equal_those_of_its_samples(name, family):
    model = model_of(family)
    with attach(name, model):
        together = greedy(model, batch_of(family), num_beams=3).sequences[:, -4:]
        for row in range(3):
            alone = greedy(model, one_of(family, row), num_beams=3).sequences[:, -4:]
            assert together[row].tolist() == alone[0].tolist()


@pytest.mark.parametrize("beams", [1, 3])
@behaviour("a budget of its own for every sample", reduces=True)
def test_one_budget_per_sample(name, family, beams, request):
    model, row = model_of(family), METHOD_TABLE[name]
    samples = samples_of(family)[:2]
    retains = [1.0, row.retain]
    if {"patches", "encoder"} & set(row.stages):
        # An encoder runs over all images at once.
        with pytest.raises(AttachmentError, match="must be one value") as refusal:
            attach(name, model, retain=retains)
        note(request, refused=str(refusal.value))
        return
    with attach(name, model, retain=retains):
        both = tiny_inputs(family, samples=samples)
        together = greedy(model, both, num_beams=beams)
    for index, retain in enumerate(retains):
        with attach(name, model, retain=retain):
            alone = greedy(model, one_of(family, index), num_beams=beams)
        if beams == 1:
            same_steps(together, index, alone)
        assert together.sequences[index, -4:].tolist() == alone.sequences[0, -4:].tolist()


def test_budgets_of_another_number_of_samples_are_refused():
    model = model_of("llava_onevision")
    for retain in ([0.5, 0.25], [0.5] * 4, [0.5] * 6):
        with (
            foveate.reduce(model, "divprune", retain=retain),
            pytest.raises(AttachmentError, match=f"names {len(retain)} samples"),
        ):
            logits_of(model, batch_of("llava_onevision"))
    twice = {key: torch.cat([value] * 2) for key, value in one_of("llava_onevision").items()}
    with (
        foveate.reduce(model, "divprune", retain=[0.5] * 3),
        pytest.raises(AttachmentError, match="the batch has 2"),
    ):
        logits_of(model, twice)
    with pytest.raises(AttachmentError, match="must be one value"):
        foveate.reduce(model, "tome", retain=[0.5, 0.25])
    # The encoder has a budget of its own here, so that of the call may differ by sample.
    recipe = "tome(retain=0.6) + divprune"
    with foveate.reduce(model, recipe, retain=[0.5, 0.25, 1.0]) as run:
        logits_of(model, batch_of("llava_onevision"))
        with pytest.raises(ValueError, match=r"\(0, 1\]"):
            run.budget = 2
        assert run.budget.retain == (0.5, 0.25, 1.0)


@behaviour("another budget between calls", reduces=True)
def test_budget_changes_between_calls(name, family):
    model, inputs, row = model_of(family), one_of(family), METHOD_TABLE[name]

    def second_token() -> tuple[torch.Tensor, list]:  # the first one does not know of the cache
        logits = greedy(model, inputs, 2).logits[1]
        return logits, [chosen(run), [(s.stage, s.layer, s.after) for s in run.report.stages]]

    with attach(name, model, retain=0.8) as run:
        first, kept_first = second_token()
        videos = {item.modality for item in run.report.items} == {"video"}
        run.budget = row.retain
        second, kept_second = second_token()
        run.budget = 1.0
        third, _ = second_token()
    with attach(name, model) as run:
        assert torch.equal(second_token()[0], second)
    assert torch.equal(third, greedy(model, inputs, 2).logits[1])
    assert torch.equal(first, second) == (kept_first == kept_second)
    # Few tokens may have one pooled size, or be merged below both budgets for their likeness; what
    # DyCoke does to images knows no budget. A video of one peak has one key frame at any budget.
    alike = name in ("f2c", "m3", "videoscan") or (name, family) == ("holitom", "video_llama_3")
    if not alike and (row.on_images or videos):
        assert kept_first != kept_second


@behaviour("without a cache, without a mask")
def test_without_a_cache(name, family):
    """No mask, no cache and gaps in the positions: what looks like packed sequences."""
    model = model_of(family)
    inputs = {k: v for k, v in one_of(family).items() if k != "attention_mask"}
    positions = "original" if "projector" in METHOD_TABLE[name].stages else None
    with attach(name, model, positions=positions):
        cached = logits_of(model, inputs, use_cache=True)[0, -1]
        alone = logits_of(model, inputs, use_cache=False)[0, -1]
        torch.testing.assert_close(alone, cached, atol=TOLERANCE, rtol=0)
        if not METHOD_TABLE[name].reads_text and "cache" not in METHOD_TABLE[name].stages:
            with_cache = greedy(model, inputs, 3)
            same_steps(greedy(model, inputs, 3, use_cache=False), 0, with_cache)


def second_turn(model, inputs, first, num: int = 3) -> dict:
    """The whole conversation so far, some new text, and the cache of the first turn."""
    rows = inputs["input_ids"].shape[0]
    ids = torch.cat([first.sequences, torch.tensor([[11, 12, 13]] * rows)], dim=1)
    mask = inputs["attention_mask"]
    ones = torch.ones(rows, ids.shape[1] - mask.shape[1], dtype=mask.dtype)
    return {"input_ids": ids, "attention_mask": torch.cat([mask, ones], dim=1)}


@behaviour("second turn on the returned cache")
def test_second_turn_on_the_returned_cache(name, family):
    model, inputs, row = model_of(family), batch_of(family), METHOD_TABLE[name]
    logits = []
    for mask_only in (True, False):
        with attach(name, model, mask_only=mask_only):
            first = greedy(model, inputs, 3)
            turn = second_turn(model, inputs, first)
            second = greedy(model, {**turn, "past_key_values": first.past_key_values}, 3)
            logits.append(torch.stack(second.logits))
            early = set(row.stages) <= {"patches", "projector", "encoder"} and not row.reads_text
            if not mask_only and early:
                # What the text does not decide is the same when all of it comes at once.
                pixels = {k: v for k, v in inputs.items() if k not in turn}
                if "mm_token_type_ids" in pixels:
                    added = turn["input_ids"].shape[1] - inputs["input_ids"].shape[1]
                    kinds = pixels["mm_token_type_ids"]
                    pixels["mm_token_type_ids"] = torch.nn.functional.pad(kinds, (0, added))
                whole = greedy(model, {**turn, **pixels}, 3)
                logits.append(torch.stack(whole.logits))
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], atol=TOLERANCE, rtol=0)


@behaviour("second image on the returned cache")
def test_second_image_on_the_returned_cache(name, family):
    """A new item after a text-only turn and after a shortened one: masks per layer, positions."""
    model = model_of(family)
    more = tiny_inputs(family, samples=(Sample(text=(2, 4), items=("image",), seed=5),))
    length = more["input_ids"].shape[1]
    for start in (one_of(family, 2), one_of(family, 0)):
        results = []
        for mask_only in (True, False):
            with attach(name, model, mask_only=mask_only) as run:
                first = greedy(model, start, 2)
                cache = first.past_key_values
                seen = cache.get_seq_length()
                mask = torch.ones(1, seen + length, dtype=torch.long)
                inputs = {**more, "attention_mask": mask, "past_key_values": cache}
                if adapter_for(model).mrope:
                    inputs["position_ids"] = torch.arange(seen, seen + length).expand(3, 1, -1)
                with torch.no_grad():
                    out = model(**inputs)
                assert cache.get_seq_length() == seen + length
                lengths = [layer.keys.shape[-2] for layer in out.past_key_values.layers]
                results.append((out.logits[0, -1], lengths, run.report.visual_before))
        (expected, full, before), (got, lengths, _) = results
        torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)
        assert before > 0 and sum(lengths) <= sum(full)


@behaviour("prompts of other shapes after each other")
def test_another_prompt_after_the_first(name, family):
    model, shapes = model_of(family), (one_of(family, 1), one_of(family, 0), batch_of(family))
    with attach(name, model) as run:
        first = [(logits_of(model, inputs), run.report.visual_after) for inputs in shapes]
        again = [(logits_of(model, inputs), run.report.visual_after) for inputs in shapes]
    for (a, kept_a), (b, kept_b) in zip(first, again, strict=True):
        assert torch.equal(a, b) and kept_a == kept_b


@behaviour("features computed beforehand")
def test_features_computed_beforehand(name, family):
    """`mm_encoder_outputs` made inside the attachment are reduced, each with its own layout."""
    model = model_of(family)
    adapter = adapter_for(model)
    inputs = tiny_inputs(family, samples=(Sample(seed=0),))
    other = tiny_inputs(family, samples=(Sample(seed=7),))
    text = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
    layout = ("image_grid_thw", "image_merge_sizes")
    text |= {k: v for k, v in inputs.items() if k in ("mm_token_type_ids", *layout)}

    def features(given):
        arguments = {k: v for k, v in given.items() if k in ("pixel_values", "image_sizes")}
        arguments |= {k: v for k, v in given.items() if k in layout}
        with torch.no_grad():
            return adapter.base(model).get_image_features(**arguments, return_dict=True)

    outside = features(inputs)
    with attach(name, model) as run:
        expected = greedy(model, inputs)
        kept = run.report.visual_after
        made = features(inputs)
        features(other)  # computed last, used never
        for _ in range(2):
            got = greedy(model, {**text, "mm_encoder_outputs": {"image": made}})
            same_steps(got, 0, expected)
            assert run.report.visual_after == kept
        with pytest.raises(AttachmentError, match="inside this attachment"):
            greedy(model, {**text, "mm_encoder_outputs": {"image": outside}})


@behaviour("embeddings given instead of ids")
def test_embeddings_prepared_by_the_user(name, family):
    model, inputs = model_of(family), batch_of(family)
    table = model.get_input_embeddings()
    embeds = {"inputs_embeds": table(inputs["input_ids"]).detach()}
    embeds |= {k: v for k, v in inputs.items() if k != "input_ids"}
    with spied(model) as seen:
        whole = logits_of(model, inputs)
    if adapter_for(model).mrope:
        # Without ids the model itself counts on as if all were text; its user gives positions.
        embeds["position_ids"] = seen["position_ids"]
    torch.testing.assert_close(logits_of(model, embeds), whole, atol=TOLERANCE, rtol=0)
    # Features put in place by the user are text to the model: nothing can be removed.
    ready = {k: seen[k] for k in ("inputs_embeds", "attention_mask", "position_ids")}
    as_text = logits_of(model, ready)
    with attach(name, model) as run:
        by_ids = logits_of(model, inputs)[:, -1]
        by_embeds = logits_of(model, embeds)[:, -1]
        torch.testing.assert_close(by_embeds, by_ids, atol=TOLERANCE, rtol=0)
        report = run.report
        assert torch.equal(logits_of(model, ready), as_text) and run.report is report


PROJECTOR = [name for name, row in METHOD_TABLE.items() if "projector" in row.stages]


@pytest.mark.parametrize("positions", ["compact", "original", None])
@pytest.mark.parametrize("name", PROJECTOR)
def test_position_policy(name, positions):
    family = "llava_onevision"
    model, inputs = model_of(family), one_of(family)
    (step,) = Recipe.of(METHOD_TABLE[name].recipe)
    with attach(name, model, positions=positions) as run, spied(model) as seen:
        logits_of(model, inputs)
    got = seen["position_ids"][0].tolist()
    if (positions or step.method.card.positions) == "compact":
        assert got == list(range(run.report.prompt_lengths[0]))
        return
    (item,) = run.report.items
    token = adapter_for(model).placeholder_ids(model)["video"]
    is_item = inputs["input_ids"][0] == token
    rows = is_item.nonzero()[:, 0]
    before, after = range(int(rows[0])), range(int(rows[-1]) + 1, len(is_item))
    assert got == [*before, *rows[item.reduction.anchor_BM[0]].tolist(), *after]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_mrope_keeps_its_positions(family):
    model, inputs = model_of(family), one_of(family)
    with pytest.raises(AttachmentError, match="cannot be renumbered"):
        attach("divprune", model, positions="compact")
    with spied(model) as seen:
        logits_of(model, inputs)
    before = seen["position_ids"]
    with attach("divprune", model), spied(model) as seen:
        logits_of(model, inputs)
    after = seen["position_ids"]
    assert after.shape[:2] == before.shape[:2] and after.shape[2] < before.shape[2]
    columns = {tuple(column) for column in before[:, 0].T.tolist()}
    assert all(tuple(column) in columns for column in after[:, 0].T.tolist())


@behaviour("assisted decoding (prompt lookup)")
def test_assisted_decoding_equals_greedy(name, family):
    """Prompt lookup feeds several tokens at a time and crops what was not accepted."""
    model, inputs = model_of(family), one_of(family)
    with attach(name, model):
        expected = greedy(model, inputs, 6)
        got = model.generate(
            **inputs, do_sample=False, max_new_tokens=6, prompt_lookup_num_tokens=3
        )
    if METHOD_TABLE[name].reads_text or METHOD_TABLE[name].rounds:
        # The first guess is part of the prefill, whose last token then is another one.
        assert got.shape == expected.sequences.shape
    else:
        assert got.tolist() == expected.sequences.tolist()
