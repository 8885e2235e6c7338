"""What decoder-stage methods read: against the model's own modules, in batches, turns and beams."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attach_suite import batch_of, greedy, logits_of, model_of, one_of, samples_of
from evidence_methods import Carries, LooksAhead, LooksAheadAndRenumbers, Observes, ReadsValues
from oracle_methods import EveryOther

import foveate
from foveate.errors import AttachmentError
from foveate.models.registry import adapter_for
from tiny import TINY_FAMILIES, Sample, tiny_inputs

every_family = pytest.mark.parametrize("family", TINY_FAMILIES)
FEW = ("llava_onevision", "qwen3_vl")


def run_with(method: Any, model: Any, inputs: Any, **options: Any) -> torch.Tensor:
    with foveate.reduce(model, method, tokens=10**6, **options):
        return logits_of(model, inputs)


@every_family
@pytest.mark.parametrize("mask_only", [False, True], ids=["short", "masked"])
def test_attention_ahead_is_what_the_layer_then_does(family, mask_only):
    for kind in (LooksAhead, LooksAheadAndRenumbers):
        method = kind((0, 2))
        run_with(method, model_of(family), batch_of(family), mask_only=mask_only)
        # Two samples with visual tokens; the last layer's attention is not declared.
        assert [layer for layer, _ in method.seen] == [2, 2]
        method = kind(())
        run_with(method, model_of(family), batch_of(family), mask_only=mask_only)
        assert [layer for layer, _ in method.seen] == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("family", FEW)
def test_attention_ahead_equals_eager_weights(family):
    model, inputs = model_of(family, attn="eager"), one_of(family)
    weights: dict[int, torch.Tensor] = {}

    def note(index):
        def hook(module, args, output):
            weights[index] = output[1]

        return hook

    class Keeps(LooksAhead):
        def compare(self, context, some, ahead, num_past):
            expected = weights[context.layer - 1][:, :, some]
            torch.testing.assert_close(ahead, expected, atol=2e-5, rtol=0)
            self.seen.append(context.layer)

    handles = [
        module.register_forward_hook(note(i))
        for i, module in enumerate(adapter_for(model).text_attentions(model))
    ]
    try:
        method = Keeps(())
        run_with(method, model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    assert method.seen == [1, 2, 3]


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("kind", [LooksAhead, LooksAheadAndRenumbers])
def test_attention_ahead_knows_earlier_turns(family, kind):
    """A second image on the cache of the first turn: each layer's own past and numbering."""
    model, start = model_of(family), tiny_inputs(family, samples=samples_of(family)[:2])
    more = Sample(text=(2, 4), items=("image",), seed=5)
    later = tiny_inputs(family, samples=(more, more))
    seen, length = start["input_ids"].shape[1], later["input_ids"].shape[1]
    later["attention_mask"] = torch.cat([start["attention_mask"], later["attention_mask"]], dim=1)
    if adapter_for(model).mrope:
        later["position_ids"] = torch.arange(seen, seen + length).expand(3, 2, -1)
    views = []

    class Keeps(kind):
        def compare(self, context, some, ahead, num_past):
            super().compare(context, some, ahead, num_past)
            views.append((context.layer - 1, context.attention(context.layer - 1)))

    method = Keeps((1,))
    with foveate.reduce(model, method, tokens=10**6), torch.no_grad():
        first = model(**start)
        views.clear()
        cache = model(**later, past_key_values=first.past_key_values).past_key_values
    for number, (layer, view) in enumerate(views):
        cached, sample = cache.layers[layer], number % 2
        keys = cached.keys[sample : sample + 1]
        if cached.valid_BT is not None:
            keys = keys[:, :, cached.valid_BT[sample]]
        torch.testing.assert_close(view.k_BGTd, keys)
    pasts = [past for _, past in method.seen]
    half = len(pasts) // 2
    assert half and not any(pasts[:half]) and all(pasts[half:])


def test_attention_ahead_in_half_precision_and_with_beams():
    family = "llava_onevision"
    model = model_of(family, torch.bfloat16)
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in one_of(family).items()}
    method = LooksAhead((), tolerance=0.02)
    run_with(method, model, inputs)
    assert len(method.seen) == 3
    method = LooksAhead((1,))
    with foveate.reduce(model_of(family), method, tokens=10**6):
        greedy(model_of(family), batch_of(family), 2, num_beams=3)
    assert len(method.seen) == 2 * 2 * 3  # layers 1 and 3 of two samples, three beams each


@every_family
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_module_taps_see_what_the_modules_see(family, attn):
    model, inputs = model_of(family, attn=attn), one_of(family)
    lengths: list[torch.Tensor] = []

    def hook(module, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        output = output[0] if isinstance(output, tuple) else output
        lengths.append(torch.stack([x[0].norm(dim=-1) for x in (hidden, output)], dim=-1))

    layers = adapter_for(model).layers(model)
    modules = [part for i in (0, 2) for part in (layers[i].self_attn, layers[i].mlp)]
    method = Observes()
    handles = [m.register_forward_hook(hook, with_kwargs=True) for m in modules]
    try:
        run_with(method, model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    ((id_S, noted),) = method.seen
    full, less = lengths[0].shape[0], lengths[2].shape[0]
    assert less == len(id_S) < full and noted.shape == (4, less, 2)
    torch.testing.assert_close(noted[0], lengths[0][id_S])
    torch.testing.assert_close(noted[1], lengths[1][id_S])
    torch.testing.assert_close(noted[2], lengths[2])
    torch.testing.assert_close(noted[3], lengths[3])


@every_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_module_taps_know_no_padding(family, side):
    """What is noted of a sample is the same alone, in a padded batch, and in the masked oracle."""
    model = model_of(family)
    noted = []
    for mask_only in (False, True):
        together = Observes()
        run_with(together, model, batch_of(family, side), mask_only=mask_only)
        noted.append([values for _, values in together.seen])
    alone = []
    for index in (0, 1):
        method = Observes()
        run_with(method, model, one_of(family, index))
        alone.append(method.seen[0][1])
    for values in noted:
        assert len(values) == 2
        for got, expected in zip(values, alone, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_unobserved_modules_and_bad_observations_are_refused():
    model, inputs = model_of("llava"), one_of("llava")

    class Asks(Observes):
        def decoder(self, tokens, context):
            return context.observed(1, "mlp")

    class Short(Observes):
        def observe(self, input_1SD, output_1SD, context):
            return input_1SD[0, 1:, 0]

    class Deep(Observes):
        def observe_layers(self, num_layers):
            return (num_layers,)

    with pytest.raises(ValueError, match="observed nothing of the mlp of layer 1"):
        run_with(Asks(), model, inputs)
    with pytest.raises(ValueError, match="one value per token"):
        run_with(Short(), model, inputs)
    with pytest.raises(AttachmentError, match="wants to observe layer 4"):
        foveate.reduce(model, Deep(), retain=0.5)


def test_only_declared_modules_are_hooked():
    model = model_of("llava")
    layers = adapter_for(model).layers(model)

    def hooked(kind: str) -> list[bool]:
        return [bool(layer.get_submodule(kind)._forward_hooks) for layer in layers]

    with foveate.reduce(model, Observes(), retain=0.5):
        assert hooked("mlp") == hooked("self_attn") == [True, False, True, False]
        assert not any(hooked("self_attn.q_proj"))
    with foveate.reduce(model, ReadsValues(), retain=0.5):
        assert hooked("self_attn.v_proj") == [False, True, False, False]
    with foveate.reduce(model, "fastv", retain=0.5):
        assert not any(hooked("self_attn.v_proj")) and not any(hooked("mlp"))


@every_family
def test_values_layout_and_hidden_states(family):
    model, method = model_of(family), ReadsValues((2,))
    inputs = one_of(family, 1)
    with foveate.reduce(model, method, tokens=10**6), torch.no_grad():
        out = model(**inputs, output_hidden_states=True)
    ((context, v_BGTd, hidden_1SD),) = method.seen
    torch.testing.assert_close(v_BGTd, out.past_key_values.layers[1].values)
    torch.testing.assert_close(hidden_1SD, out.hidden_states[2])
    ids = inputs["input_ids"][0]
    placeholders = adapter_for(model).placeholder_ids(model).values()
    visual_L = sum(ids == token for token in placeholders).bool()
    where = visual_L.nonzero()[:, 0]
    assert context.visual_N.tolist() == where.tolist()
    assert context.before_R.tolist() == list(range(int(where[0])))
    assert context.after_R.tolist() == list(range(int(where[-1]) + 1, len(ids)))
    assert context.num_tokens == len(ids)
    # Item numbers rise through the prompt, and text belongs to the item before it.
    item_N, segment_S = context.item_N, context.segment_S
    assert (item_N.diff() >= 0).all() and item_N.unique().numel() >= 2
    assert segment_S[: where[0]].eq(-1).all() and segment_S[context.visual_N].equal(item_N)
    assert segment_S[context.after_R].eq(item_N[-1]).all()
    assert (segment_S.diff() >= 0).all()


def test_layout_outlives_what_is_dropped():
    """The instruction stays what it was, even when the last item is gone."""
    family = "llava_onevision"
    model, sample = model_of(family), Sample(text=(3, 4, 5), items=("image", "image"), seed=0)
    seen = []

    class OnlyTheFirst(EveryOther):
        def decoder(self, tokens, context):
            seen.append(context)
            if context.layer == 1:
                keep = (context.item_N == 0).nonzero()[:, 0]
                return foveate.Reduction.select(keep, tokens.num_tokens)
            return None

    run_with(OnlyTheFirst((1, 2)), model, tiny_inputs(family, samples=(sample,)))
    before, after = seen
    assert after.item_N.unique().tolist() == [0]
    assert len(after.after_R) == len(before.after_R) < after.num_tokens - after.visual_N[-1] - 1
    assert after.segment_S.unique().tolist() == [-1, 0, 1]
    assert after.after_R.tolist() == list(range(after.num_tokens))[-len(before.after_R) :]


@every_family
def test_carried_values_follow_their_tokens(family):
    model, method = model_of(family), Carries()
    run_with(method, model, batch_of(family))
    entries = [entry for entry in method.seen if entry[0] != "segment"]
    assert [entry[0] for entry in entries] == [0, 0, 2, 2]
    for (_, item_N, place_N), (_, later_item_N, later_N) in zip(entries, entries[2:], strict=False):
        for item in item_N.unique():
            mine = place_N[item_N == item].tolist()
            assert mine == list(range(1, 2 * len(mine), 2))
        keep = torch.arange(1, len(place_N), 3)
        assert later_N.equal(place_N[keep]) and later_item_N.equal(item_N[keep])


def test_nothing_carried_is_said_so():
    class Forgets(Carries):
        def projector(self, tokens, context):
            return None

    class Shortens(Carries):
        def projector(self, tokens, context):
            context.carry("place", torch.arange(3))

    model, inputs = model_of("llava"), one_of("llava")
    with pytest.raises(ValueError, match="carries no 'place' from the projector stage"):
        run_with(Forgets(), model, inputs)
    with pytest.raises(ValueError, match="one value per token of the item"):
        run_with(Shortens(), model, inputs)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ((3, 4, 5), [4, 5]),  # each item's text follows it
        ((3, 0, 5), [5, 5]),  # nothing between them: both share the next text
        ((3, 4, 0), [4, 4]),  # nothing behind the last: the text before it
    ],
)
def test_text_segments_of_an_interleaved_prompt(text, expected):
    model, method = model_of("llava"), Carries()
    sample = Sample(text=text, items=("image", "image"), seed=0)
    inputs = tiny_inputs("llava", samples=(sample,))
    run_with(method, model, inputs)
    segments = [entry[1] for entry in method.seen if entry[0] == "segment"]
    assert [s.shape[1] for s in segments] == expected
    table = adapter_for(model).language_model(model).get_input_embeddings()
    embeds = table(inputs["input_ids"])
    is_text = inputs["input_ids"][0] != next(
        iter(adapter_for(model).placeholder_ids(model).values())
    )
    for segment in segments:
        at = (embeds[0][is_text][:, None] == segment[0][None]).all(-1).any(1)
        assert int(at.sum()) >= segment.shape[1]
