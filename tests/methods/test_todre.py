"""ToDRE: the pivot, both objectives, and the layer after which no visual token is left."""

from __future__ import annotations

import pytest
import torch

import foveate
from foveate import ops
from foveate.core import Budget, Grid, Plane, ProjectorContext, Tokens
from foveate.methods.todre import ToDRE
from tiny import tiny_inputs, tiny_model

from .helpers import context_for, decoder_context, item, view_of


def order_of(method: ToDRE, grid: Grid, scores_N: torch.Tensor, **budget) -> list[int]:
    context = context_for(grid, Budget(**budget), scores_N)
    assert method.projector(item(grid), context) is not None
    return context.state["order"].tolist()


def relevance(row_S: torch.Tensor, num_text: int, **arguments):
    """What is left when the last of `num_text` tokens of instruction attend as `row_S` says."""
    visual_N = torch.arange(2, len(row_S) - num_text)
    context = decoder_context(view_of(row_S, visual_N), 29, num_layers=32)
    tokens = Tokens(torch.zeros(1, len(visual_N), 4))
    return ToDRE(**arguments).decoder(tokens, context)


# -- stage 1 ----------------------------------------------------------------------------------


def test_published_counts() -> None:
    """LLaVA-NeXT: 5 tiles of 576 tokens."""
    grid = Grid.image(5 * 24, 24)
    assert ToDRE().count(grid, Budget(retain=0.25)).tokens == 720
    assert ToDRE().count(grid, Budget(retain=0.1)).tokens == 288


@pytest.mark.parametrize("objective", ["max_sum", "k_center"])
def test_the_pivot_is_first_and_the_rest_follows_the_objective(objective) -> None:
    grid = Grid.video(3, 4, 5)
    scores_N = torch.rand(60, generator=torch.Generator().manual_seed(4))
    order = order_of(ToDRE(objective), grid, scores_N, tokens=20)
    assert order[0] == int(scores_N.argmax()) and len(set(order)) == 20
    similarity_NN = ops.cosine_similarity_matrix(item(grid).x_BND[0].double())
    for step in range(1, 20):
        chosen_NK = similarity_NN[:, order[:step]]
        near_N = chosen_NK.sum(1) if objective == "max_sum" else chosen_NK.amax(1)
        near_N[order[:step]] = torch.inf
        assert order[step] == int(near_N.argmin())


def test_only_the_thumbnail_has_the_pivot_of_a_tiled_image() -> None:
    grid = Grid((Plane(3, 3), Plane(6, 6, row_newline=True)))
    scores_N = torch.arange(grid.num_tokens).float()
    scores_N[4] = 8.5
    order = order_of(ToDRE(), grid, scores_N, retain=0.5)
    assert order[0] == 4 and max(order) > 9
    assert len(order) == round(45 * 0.5)  # one share for thumbnail and mosaic together


def test_a_pivot_without_cls_receives_most_attention() -> None:
    grid = Grid.image(4, 5)
    received_N = torch.zeros(20)
    received_N[13] = 1.0
    signals = {"encoder.received_attention": received_N[None]}
    context = ProjectorContext(Budget(retain=0.3), grid=grid, read=signals.get)
    assert ToDRE().projector(item(grid), context) is not None
    assert context.state["order"][0] == 13


def crowd(*others: list[float]) -> Tokens:
    """Nearly equal tokens, then some others."""
    near_ND = torch.tensor([[1.0, 0.0, 0.0]]).repeat(30, 1)
    near_ND += 0.01 * torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    return Tokens.from_grid(
        torch.cat([near_ND, torch.tensor(others)]), Grid.image(1, 30 + len(others))
    )


def test_k_center_takes_the_outlier_second() -> None:
    tokens = crowd([0.0, 1.0, 0.0])
    context = context_for(Grid.image(1, 31), Budget(tokens=4), torch.arange(31.0).flip(0))
    ToDRE("k_center").projector(tokens, context)
    assert context.state["order"][:2].tolist() == [0, 30]


def test_max_sum_takes_near_duplicates_of_the_opposite_direction() -> None:
    """A sum, not a minimum: with many kept on one side all of the far side follow."""
    far = [[-1.0, 0.0, 0.01 * n] for n in range(3)]
    tokens = crowd(*far, [0.0, 1.0, 0.0])
    scores_N = torch.arange(34.0).flip(0)

    def order(objective) -> list[int]:
        context = context_for(Grid.image(1, 34), Budget(tokens=8), scores_N)
        ToDRE(objective).projector(tokens, context)
        return context.state["order"].tolist()

    assert (
        set(order("k_center")[1:3]) & {33} and len(set(order("k_center")[:3]) & {30, 31, 32}) == 1
    )
    assert {30, 31, 32} <= set(order("max_sum"))


# -- stage 2 ----------------------------------------------------------------------------------


def test_all_leave_below_the_threshold_and_none_above() -> None:
    row_S = torch.ones(20)
    row_S[2:15] = 0.04  # 13 visual tokens, 5 tokens of instruction
    rows_RS = row_S.expand(5, 20).tril(15)  # causal
    share = float((rows_RS[:, 2:15].sum(1) / rows_RS.sum(1)).mean())
    assert relevance(row_S, 5, tau=0.99 * share) is None
    reduction = relevance(row_S, 5, tau=1.01 * share)
    assert reduction is not None and reduction.num_out == 0


def test_extreme_thresholds() -> None:
    for seed in range(3):
        row_S = torch.rand(20, generator=torch.Generator().manual_seed(seed))
        assert relevance(row_S, 4, tau=0.0) is None
        assert relevance(row_S, 4, tau=1.01) is not None


def test_without_instruction_nothing_leaves() -> None:
    assert relevance(torch.ones(20), 0, tau=1.01) is None


@pytest.mark.parametrize(
    ("num_layers", "check", "before"), [(32, 28, 29), (28, 24, 25), (40, 35, 36), (8, 6, 7)]
)
def test_layers_follow_the_depth(num_layers: int, check: int, before: int) -> None:
    assert ToDRE().attention_layers(num_layers) == (check,)
    assert ToDRE().decoder_layers(num_layers) == (before,)
    assert ToDRE().decoder_layers(1) == ToDRE().attention_layers(1) == ()


def test_later_layers_equal_those_that_mask_the_visual_keys() -> None:
    model, inputs = tiny_model("llava"), tiny_inputs("llava")
    logits = []
    for mask_only in (True, False):
        with (
            torch.no_grad(),
            foveate.reduce(model, ToDRE(tau=1.1), retain=0.5, mask_only=mask_only) as run,
        ):
            out = model(**inputs)
        logits.append(out.logits[0, -1])
    torch.testing.assert_close(*logits, atol=2e-5, rtol=0)
    lengths, text = run.report.layer_lengths[0], run.report.prompt_lengths[0]
    assert lengths[:3] == [text] * 3 and lengths[3] == text - run.report.visual_after
    assert [layer.keys.shape[-2] for layer in out.past_key_values.layers] == lengths


@pytest.mark.parametrize(
    "arguments", [{"objective": "max_min"}, {"tau": -0.1}, {"tau": float("nan")}]
)
def test_bad_arguments(arguments: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        ToDRE(**arguments)


def test_layers_that_do_not_exist() -> None:
    for layer, match in ((31, "last layer"), (32, "does not exist")):
        with pytest.raises(ValueError, match=match):
            ToDRE(check_layer=layer).check(None, 32)
