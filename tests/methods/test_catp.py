"""CATP: coverage with text, demonstrations as one pool, the query, and all counts."""

from __future__ import annotations

import math

import pytest
import torch

import foveate
from foveate.core import AttentionView, Budget, DecoderContext, Grid, Tokens
from foveate.methods.catp import CATP, aligned_coverage, query_start
from tiny import Sample, tiny_inputs, tiny_model

from .helpers import context_for, item

D = 6


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Prompt:
    """An interleaved prompt inside the LLM: per sample some image tokens, then some text.

    Attributes:
        sizes: patches of every image before the first cut.
        kept: those that entered the LLM.
    """

    def __init__(self, sizes: list[int], kept: list[int], text: int = 3) -> None:
        self.sizes, self.kept = sizes, kept
        segment, visual, spans, at = [-1, -1], [], [], 2
        for number, count in enumerate(kept):
            visual += range(at, at + count)
            spans.append((at, at + count - 1))
            segment += [number] * (count + text)
            at += count + text
        self.segment_S, self.visual_N = torch.tensor(segment), torch.tensor(visual)
        self.span_I2, self.item_N = torch.tensor(spans), self.segment_S[visual]
        self.num = at
        self.hidden_SD = normal(at, D)
        self.rows = {5: torch.ones(at), 6: torch.ones(at)}

    def cut(self, method: CATP, budget: Budget, layer: int, state: dict, alive=None):
        """What stays of the tokens `alive` (numbers in the prompt) before a layer."""
        alive = torch.arange(self.num) if alive is None else alive
        is_visual = torch.isin(alive, self.visual_N)
        share = torch.tensor([s * budget.fraction(s) for s in self.sizes], dtype=torch.float64)

        def view(asked: int) -> AttentionView:
            keys = self.rows[asked].clamp_min(1e-20).log()[None, None, :, None]
            return AttentionView(torch.ones(1, 1, self.num, 1), keys, 1.0, self.visual_N)

        context = DecoderContext(
            budget,
            state=state,
            layer=layer,
            num_layers=32,
            num_visual=len(self.visual_N),
            num_text=self.num - len(self.visual_N),
            visual_N=is_visual.nonzero()[:, 0],
            attention=view,
            survivors=lambda asked: alive,
            hidden=lambda: self.hidden_SD[alive][None],
            carried=lambda name: share[self.segment_S[alive[is_visual]]],
            id_S=alive,
            span_I2=self.span_I2,
        )
        tokens = Tokens(self.hidden_SD[alive[is_visual]][None])
        reduction = method.decoder(tokens, context)
        if reduction is None:
            return alive
        left = alive[is_visual][reduction.anchor_BM[0]]
        return torch.cat([alive[~is_visual], left]).sort().values

    def both(self, method: CATP, budget: Budget) -> list[list[int]]:
        """Tokens left of every image after both cuts inside the LLM."""
        state: dict = {}
        alive = self.cut(method, budget, 7, state)
        alive = self.cut(method, budget, 8, state, alive)
        return [
            [int(a) for a in alive if a in self.visual_N and self.segment_S[a] == n]
            for n in range(len(self.sizes))
        ]


# -- before the LLM ---------------------------------------------------------------------------


@pytest.mark.parametrize("retain", [0.333, 0.222, 0.101])
def test_first_cut_takes_half_of_what_goes(retain: float) -> None:
    grid = Grid.image(24, 24)
    assert CATP().count(grid, Budget(retain=retain)).tokens == math.floor(576 * (1 + retain) / 2)
    # Counts that are whole stay whole, however the fraction was rounded.
    for tokens in range(1, 49):
        assert CATP().count(Grid.image(7, 7), Budget(tokens=tokens)).tokens == (49 + tokens) // 2


def test_a_large_weight_keeps_what_the_text_says() -> None:
    x_PD, text_D = normal(20, D), normal(D, seed=1)
    best = torch.nn.functional.cosine_similarity(x_PD, text_D[None]).argsort(descending=True)
    assert aligned_coverage(x_PD, text_D, 6, 1e5).tolist() == best[:6].tolist()


def test_without_the_text_every_cluster_is_covered_first() -> None:
    centres = 3 * torch.eye(5, D).repeat_interleave(8, 0)
    x_PD = centres + 0.05 * normal(40, D)
    for text_D in (None, normal(D)):
        order = aligned_coverage(x_PD, text_D, 12, 0.0)
        assert sorted((order[:5] // 8).tolist()) == [0, 1, 2, 3, 4]


def test_the_text_of_the_image_takes_part() -> None:
    grid = Grid.image(5, 8)
    tokens = item(grid)
    context = context_for(grid, Budget(retain=0.2))
    text_D = context.read("text.segment")[0].mean(0)
    reduction = CATP(text_weight=3.0).projector(tokens, context)
    assert reduction is not None
    expected = aligned_coverage(tokens.x_BND[0], text_D, 24, 3.0).sort().values
    assert reduction.anchor_BM[0].tolist() == expected.tolist()
    blind = CATP(text_weight=0.0).projector(tokens, context_for(grid, Budget(retain=0.2)))
    assert blind is not None and not blind.anchor_BM.equal(reduction.anchor_BM)
    assert float(context.carried["share"][0]) == pytest.approx(8.0)


# -- inside the LLM ---------------------------------------------------------------------------


@pytest.mark.parametrize("retain", [0.333, 0.222, 0.101])
def test_counts_from_the_formulas(retain: float) -> None:
    """4-shot: the demonstrations hold their total together, the query the rest."""
    sizes = [57, 48, 61, 40, 57]
    prompt = Prompt(sizes, [math.floor(s * (1 + retain) / 2) for s in sizes])
    left = [len(image) for image in prompt.both(CATP(), Budget(retain=retain))]
    assert sum(left[:4]) == math.floor(retain * sum(sizes[:4]))
    assert sum(left) == math.floor(retain * sum(sizes))
    assert left[:4] != [math.floor(retain * s) for s in sizes[:4]], "shares differ"


def test_published_share_of_64_tokens_an_image() -> None:
    """3-shot, 64 of 576 tokens an image: 192 of the demonstrations and 64 of the query."""
    prompt = Prompt([576] * 4, [320] * 4)
    left = [len(image) for image in prompt.both(CATP(), Budget(tokens=64))]
    assert sum(left[:3]) == 192 and left[3] == 64


def test_demonstrations_are_ranked_by_the_rise_and_the_query() -> None:
    prompt, budget = Prompt([10] * 3, [7] * 3), Budget(retain=0.4)
    prompt.rows[5] = torch.rand(prompt.num, generator=torch.Generator().manual_seed(1))
    prompt.rows[6] = torch.rand(prompt.num, generator=torch.Generator().manual_seed(2))
    left = prompt.both(CATP(), budget)
    before, after = (prompt.rows[n] / prompt.rows[n].sum() for n in (5, 6))
    query_D = prompt.hidden_SD[prompt.segment_S == 2].mean(0)
    likeness = torch.nn.functional.cosine_similarity(prompt.hidden_SD, query_D[None])
    score_S = (after - before).clamp_min(0) + 0.6 * likeness
    pool = prompt.visual_N[prompt.item_N < 2]
    expected = pool[score_S[pool].argsort(descending=True)[:8]].sort().values
    assert left[0] + left[1] == expected.tolist()
    target_D = prompt.hidden_SD[expected].mean(0)
    likeness = torch.nn.functional.cosine_similarity(prompt.hidden_SD, target_D[None])
    pool = prompt.visual_N[prompt.item_N == 2]
    expected = pool[likeness[pool].argsort(descending=True)[:4]].sort().values
    assert left[2] == expected.tolist()


def test_a_rise_beats_constant_high_attention() -> None:
    prompt = Prompt([4, 4], [3, 3])
    constant, rising = prompt.visual_N[0], prompt.visual_N[2]
    for layer in (5, 6):
        prompt.rows[layer][constant] = 20.0
    prompt.rows[6][rising] = 5.0
    left = prompt.both(CATP(query_weight=0.0), Budget(tokens=1))
    assert left[0] == [int(rising)]


def test_the_demonstration_that_resembles_the_query_keeps_most() -> None:
    prompt = Prompt([20] * 4, [14] * 4)
    prompt.hidden_SD[prompt.segment_S == 3] += 4.0
    prompt.hidden_SD[prompt.visual_N[prompt.item_N == 1]] += 4.0
    left = [len(image) for image in prompt.both(CATP(), Budget(retain=0.2))]
    assert left[1] == max(left[:3]) == 12 and sum(left[:3]) == 12


def test_permuted_demonstrations_permute_the_choice() -> None:
    prompt, budget = Prompt([10] * 3, [7] * 3), Budget(retain=0.3)
    prompt.rows[6] = torch.rand(prompt.num, generator=torch.Generator().manual_seed(3))
    left = prompt.both(CATP(), budget)
    swapped = Prompt([10] * 3, [7] * 3)
    order = torch.arange(prompt.num)
    order[2:12], order[12:22] = torch.arange(12, 22), torch.arange(2, 12)
    swapped.hidden_SD, swapped.rows[6] = prompt.hidden_SD[order], prompt.rows[6][order]
    other = swapped.both(CATP(), budget)
    assert [n + 10 for n in left[0]] == other[1] and [n - 10 for n in left[1]] == other[0]
    assert left[2] == other[2]


def test_one_image_is_compared_with_the_whole_query() -> None:
    prompt = Prompt([10], [7])
    assert len(prompt.cut(CATP(), Budget(retain=0.4), 7, {})) == prompt.num
    (left,) = prompt.both(CATP(), Budget(retain=0.4))
    query_D = prompt.hidden_SD[2:].mean(0)
    likeness = torch.nn.functional.cosine_similarity(prompt.hidden_SD, query_D[None])
    best = likeness[prompt.visual_N].argsort(descending=True)[:4].sort().values
    assert left == (best + 2).tolist()


def test_tiles_of_the_last_image_are_the_query() -> None:
    segment_S = torch.tensor([-1, 0, 0, 1, 1, 2, 2, 2, 3, 3])
    assert query_start(segment_S, torch.tensor([1, 3, 4, 5, 6, 7, 8])) == 1
    assert query_start(segment_S, torch.tensor([1, 3, 5, 6, 8])) == 3
    assert query_start(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2])) == 0


def test_counts_on_a_model() -> None:
    """Two demonstrations and a query; text is never touched, and deeper layers hold the budget."""
    sample = Sample(text=(2, 3, 4, 5), items=("image",) * 3, seed=0)
    model, inputs = tiny_model("llava"), tiny_inputs("llava", samples=(sample,))
    with torch.no_grad(), foveate.reduce(model, "catp", retain=0.4) as run:
        out = model(**inputs)
    sizes = [entry.before for entry in run.report.items]
    assert [entry.after for entry in run.report.items] == [int(s * 0.7) for s in sizes]
    text = run.report.prompt_lengths[0] - run.report.visual_after
    demonstrations, total = int(0.4 * sum(sizes[:2])), int(0.4 * sum(sizes))
    entered, lengths = run.report.visual_after, run.report.layer_lengths[0]
    pruned = entered - (int(sizes[0] * 0.7) + int(sizes[1] * 0.7)) + demonstrations
    assert lengths == [text + n for n in (entered, entered, pruned, total)]
    assert [layer.keys.shape[-2] for layer in out.past_key_values.layers] == lengths


# -- settings ---------------------------------------------------------------------------------


def test_layers_follow_the_depth() -> None:
    assert CATP().decoder_layers(32) == (7, 8) and CATP(layer=10).attention_layers(40) == (9, 10)
    assert CATP().decoder_layers(4) == (2, 3)
    for layer, num_layers, match in ((0, 32, "lies in 1"), (30, 32, "lies in 1"), (6, 3, "four")):
        with pytest.raises(ValueError, match=match):
            CATP(layer=layer).check(None, num_layers)


@pytest.mark.parametrize("name", ["text_weight", "query_weight"])
def test_bad_arguments(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        CATP(**{name: -1.0})
