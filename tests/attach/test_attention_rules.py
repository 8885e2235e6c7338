"""Attention rules: what a recipe may change about who attends to whom, alone and with reducers.

Legend: S tokens of a sample, N visual tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from attach_suite import TOLERANCE, batch_of, greedy, logits_of, model_of, one_of
from oracle_methods import EveryOther, Parks, Renumbers, _card

import foveate
from foveate.core import AttentionRule, Method, Recipe, get_method
from foveate.errors import AttachmentError, RecipeError
from foveate.models.registry import adapter_for
from tiny import TINY_FAMILIES

FAMILIES = ("llava_onevision", "qwen3_vl", "internvl")
every_family = pytest.mark.parametrize("family", FAMILIES)


@dataclass(frozen=True)
class Rules(Method):
    """One rule by name, for all samples."""

    card = _card("rules", "decoder")
    kind: str = "empty"

    def attention_rule(self, context):
        S = context.num_tokens
        if self.kind == "empty":
            return AttentionRule()
        if self.kind == "causal":
            return AttentionRule(visible_SS=torch.ones(S, S).tril().bool())
        if self.kind == "blind":  # the last five tokens see no visual token
            visible_SS = torch.ones(S, S).tril().bool()
            visible_SS[-5:] &= ~context.is_visual_S
            return AttentionRule(visible_SS=visible_SS)
        if self.kind == "ahead":  # visual tokens see one another in both directions
            visual_S = context.is_visual_S
            return AttentionRule(
                visible_SS=torch.ones(S, S).tril().bool() | (visual_S[:, None] & visual_S)
            )
        if self.kind == "shift":  # what follows the first visual token moves down by two
            first = int(context.visual_N[0])
            return AttentionRule(shift_S=(torch.arange(S) > first) * 2)
        return AttentionRule(shift_S=torch.zeros(S + 1, dtype=torch.long))


@every_family
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_an_empty_rule_changes_no_bit(family, attn):
    model, inputs = model_of(family, attn=attn), one_of(family)
    expected, ids = logits_of(model, inputs), greedy(model, inputs).sequences
    with foveate.reduce(model, Rules()) as run:
        assert run.active
        assert torch.equal(logits_of(model, inputs), expected)
        assert torch.equal(greedy(model, inputs).sequences, ids)
        assert run.report.visual_after == run.report.visual_before > 0


@every_family
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_the_causal_rule_is_what_the_model_does(family, attn):
    model, inputs = model_of(family, attn=attn), batch_of(family)
    expected = torch.stack(greedy(model, inputs).logits)
    with foveate.reduce(model, Rules("causal")):
        got = torch.stack(greedy(model, inputs).logits)
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)


@every_family
def test_rows_do_not_see_hidden_keys(family):
    """The rule of the last five rows is what masking those keys in every layer gives."""
    inputs = one_of(family)
    model = model_of(family, attn="eager")
    with foveate.reduce(model, Rules("blind")) as run, torch.no_grad():
        weights = model(**inputs, output_attentions=True).attentions
        visual = run.report.visual_before
    ids = inputs["input_ids"][0]
    tokens = adapter_for(model).placeholder_ids(model).values()
    visual_N = torch.stack([ids == token for token in tokens]).any(0).nonzero()[:, 0]
    assert len(visual_N) == visual
    for layer_1HSS in weights:
        assert (layer_1HSS[:, :, -5:, visual_N] == 0).all()
        assert (layer_1HSS[:, :, -6, visual_N] > 0).any()


def test_rows_may_see_ahead():
    model, inputs = model_of("llava_onevision"), one_of("llava_onevision")
    with foveate.reduce(model, Rules("causal")):
        causal = logits_of(model, inputs)[0]
    with foveate.reduce(model, Rules("ahead")):
        ahead = logits_of(model, inputs)[0]
    token = adapter_for(model).placeholder_ids(model)["video"]
    visual_N = (inputs["input_ids"][0] == token).nonzero()[:, 0]
    first, last = int(visual_N[0]), int(visual_N[-1])
    torch.testing.assert_close(ahead[:first], causal[:first], atol=TOLERANCE, rtol=0)
    assert (ahead[first] - causal[first]).abs().max() > 100 * TOLERANCE
    assert (ahead[last] - causal[last]).abs().max() > 100 * TOLERANCE


def test_shifted_positions_reach_the_model_and_stay_shifted():
    """All tokens behind the first visual one at positions that overlap; later tokens follow."""
    family = "llava_onevision"
    model, inputs = model_of(family), one_of(family)
    seen = []
    text = adapter_for(model).language_model(model)
    with foveate.reduce(model, Rules("shift")):
        handle = text.rotary_emb.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(
                (args[1] if len(args) > 1 else kwargs["position_ids"]).flatten().tolist()
            ),
            with_kwargs=True,
        )
        try:
            greedy(model, inputs, 3)
        finally:
            handle.remove()
    S = inputs["input_ids"].shape[1]
    token = adapter_for(model).placeholder_ids(model)["video"]
    first = int((inputs["input_ids"][0] == token).nonzero()[0])
    assert seen[0] == [*range(first + 1), *range(first - 1, S - 2)]
    assert seen[1:] == [[S - 2], [S - 1]]


@pytest.mark.parametrize("recipe", ["vista_llama", Rules("ahead"), Rules("shift")], ids=str)
@every_family
def test_step_by_step_equals_the_whole(family, recipe):
    """Generated tokens read the cache as if they had been part of a longer prompt's forward."""
    model, inputs = model_of(family), one_of(family)
    with foveate.reduce(model, recipe):
        cached = torch.stack(greedy(model, inputs).logits)
        whole = torch.stack(greedy(model, inputs, use_cache=False).logits)
    torch.testing.assert_close(cached, whole, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "reducer",
    [EveryOther((1, 3)), EveryOther((2,), merge=True), Parks((1,), back=3), Renumbers((1, 3))],
    ids=["drops", "merges", "parks", "renumbers"],
)
@pytest.mark.parametrize("rule", ["vista_llama", Rules("ahead")], ids=str)
@every_family
def test_survivors_keep_their_rule(family, reducer, rule):
    """Shorter sequences against full ones with masks: prefill, decoding, a padded batch, beams."""
    model, inputs = model_of(family), batch_of(family)
    recipe = Recipe.of([rule, reducer])
    logits, ids = [], []
    for mask_only in (True, False):
        with foveate.reduce(model, recipe, mask_only=mask_only):
            logits.append(torch.stack(greedy(model, inputs, 3).logits))
            ids.append(greedy(model, inputs, 3, num_beams=3).sequences)
    torch.testing.assert_close(logits[1], logits[0], atol=TOLERANCE, rtol=0)
    assert torch.equal(ids[0], ids[1])
    with foveate.reduce(model, reducer, tokens=10**6):
        without = torch.stack(greedy(model, inputs, 3).logits)
    assert (without[0, :2] - logits[1][0, :2]).abs().max() > 100 * TOLERANCE
    # Nobody asked a sample without visual tokens.
    torch.testing.assert_close(without[:, 2], logits[1][:, 2], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "reducer", ["fastv", "divprune", "quickvideo", "aim(schedule=(1, .5, 0, 0))"]
)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@every_family
def test_equal_distance_with_registered_reducers(family, attn, reducer):
    model, inputs = model_of(family, attn=attn), batch_of(family)
    with foveate.reduce(model, f"{reducer} + vista_llama", retain=0.5) as run:
        together = greedy(model, inputs, 3)
        for row in range(3):
            alone = greedy(model, one_of(family, row), 3)
            torch.testing.assert_close(
                torch.stack(together.logits)[:, row],
                torch.stack(alone.logits)[:, 0],
                atol=TOLERANCE,
                rtol=0,
            )
        logits_of(model, one_of(family))
        lengths = run.report.cache_lengths[0]
    assert min(lengths) < run.report.layer_lengths[0][0] or run.report.visual_after < 0.6 * (
        run.report.visual_before
    )


def test_attention_views_show_what_the_layer_did():
    """FastV's scores under the rule are rows of the attention that eager layers really have."""
    family = "llava_onevision"
    model, inputs = model_of(family, attn="eager"), one_of(family)
    with foveate.reduce(model, "vista_llama"), torch.no_grad():
        expected = model(**inputs, output_attentions=True).attentions
    rows = []

    @dataclass(frozen=True)
    class Reads(EveryOther):
        card = _card("reads", "decoder")

        def attention_layers(self, num_layers):
            return (0,)

        def decoder(self, tokens, context):
            rows.append(context.attention(0).rows(torch.arange(context.num_tokens)))

    with foveate.reduce(model, [get_method("vista_llama")(), Reads((1,))], tokens=10**6):
        logits_of(model, inputs)
    torch.testing.assert_close(rows[0], expected[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_bf16(family):
    model, inputs = model_of(family, torch.bfloat16), dict(batch_of(family))
    for name, value in inputs.items():
        if value.is_floating_point():
            inputs[name] = value.to(torch.bfloat16)
    with foveate.reduce(model, "fastv + vista_llama", retain=0.5):
        out = greedy(model, inputs, 3)
    assert all(torch.isfinite(step).all() for step in out.logits)
    assert {layer.keys.dtype for layer in out.past_key_values.layers} == {torch.bfloat16}


def test_rules_take_no_budget_and_budgets_go_to_reducers():
    with pytest.raises(RecipeError, match="reduces nothing"):
        foveate.reduce(model_of("llava_onevision"), "vista_llama", retain=0.5)
    model, inputs = model_of("llava_onevision"), one_of("llava_onevision")
    with foveate.reduce(model, "vista_llama + fastv", retain=0.3) as run:
        logits_of(model, inputs)
    (stage,) = run.report.stages
    assert stage.method == "fastv" and stage.after[0] == round(0.3 * stage.before[0])


def test_bad_rules_and_pairs_are_refused():
    model, inputs = model_of("llava_onevision"), one_of("llava_onevision")
    for recipe, error, match in (
        (Rules("long"), ValueError, "speaks of"),
        (Recipe.of([Rules("shift"), Rules("shift")]), AttachmentError, "both number the tokens"),
        (Recipe.of([Rules("shift"), Renumbers((1,))]), AttachmentError, "numbers the tokens anew"),
    ):
        with foveate.reduce(model, recipe), pytest.raises(error, match=match):
            logits_of(model, inputs)
    with pytest.raises(ValueError, match="hides token 1 from itself"):
        AttentionRule(visible_SS=torch.tensor([[True, False], [True, False]]))
    with pytest.raises(ValueError, match="must be bool"):
        AttentionRule(unrotated_S=torch.zeros(3))
    with pytest.raises(ValueError, match=r"\[3, 4\] tokens"):
        AttentionRule(shift_S=torch.arange(4), unrotated_S=torch.zeros(3).bool())
    text = adapter_for(model).text_config(model)
    text._attn_implementation = "flash_attention_2"
    try:
        with pytest.raises(AttachmentError, match="cannot do"):
            foveate.reduce(model, "vista_llama")
    finally:
        text._attn_implementation = "sdpa"


def test_a_cache_of_unrotated_keys_needs_its_recipe():
    model, inputs = model_of("llava_onevision"), one_of("llava_onevision")
    with foveate.reduce(model, "vista_llama"):
        cache = model(**inputs).past_key_values
    with pytest.raises(AttachmentError, match="without the recipe"):
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)
