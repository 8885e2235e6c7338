"""TransPrune: transitions, schedules and cuts."""

from __future__ import annotations

import pytest
import torch

from foveate.core import AttentionView, Budget, DecoderContext, ModuleContext, Tokens
from foveate.methods.transprune import TransPrune, transition_variation
from foveate.ops import mean_share

HIGH, LOW = 0.41015625, 0.3125


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def context_of(
    transition_S: torch.Tensor,
    keys_S: torch.Tensor,
    visual_N: torch.Tensor,
    layer: int = 7,
    budget: Budget | None = None,
    **more,
) -> DecoderContext:
    """A context in which every layer noted half of `transition_S` per module."""
    S = len(transition_S)
    view = AttentionView(torch.ones(1, 1, S, 1), keys_S[None, None, :, None], 1.0, visual_N)
    return DecoderContext(
        budget or Budget(retain=HIGH),
        layer=layer,
        num_layers=32,
        **{
            "num_visual": len(visual_N),
            "num_text": S - len(visual_N),
            "visual_N": visual_N,
            "attention_ahead": lambda: view,
            "observed": lambda layer, module: transition_S / 2,
            **more,
        },
    )


def test_a_module_that_only_scales_gives_equal_transitions() -> None:
    x_1SD = normal(1, 9, 16)
    torch.testing.assert_close(transition_variation(x_1SD, 3 * x_1SD), torch.full((9,), 3 / 9))
    # The softmax runs over all tokens: with unit lengths the values sum to 1.
    y_1SD = normal(1, 9, 16, seed=1)
    y_1SD *= x_1SD.norm(dim=-1, keepdim=True) / y_1SD.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(transition_variation(x_1SD, y_1SD).sum(), torch.tensor(1.0))


def test_a_turn_counts_more_than_a_repetition() -> None:
    x_1SD, y_1SD = torch.eye(4)[None, [0, 0, 0]], torch.eye(4)[None, [0, 1, 0]]
    y_1SD[0, 2] = -y_1SD[0, 2]
    value_S = transition_variation(x_1SD, y_1SD)
    assert value_S.argsort().tolist() == [0, 1, 2]
    paper_S = transition_variation(x_1SD, y_1SD, absolute=True)
    assert paper_S[0] == paper_S[2] < paper_S[1]


def test_transitions_of_zero_tokens_and_in_half_precision() -> None:
    x_1SD, y_1SD = normal(1, 5000, 8), normal(1, 5000, 8, seed=1)
    x_1SD[:, 3] = 0
    full_S = transition_variation(x_1SD, y_1SD)
    assert full_S.isfinite().all()
    half_S = transition_variation(x_1SD.bfloat16(), y_1SD.bfloat16())
    assert half_S.dtype == torch.float32
    rest = torch.arange(5000) != 3
    torch.testing.assert_close(half_S[rest], full_S[rest], rtol=0.05, atol=1e-4)


def test_published_schedules_are_met_exactly() -> None:
    assert TransPrune().schedule(HIGH, 32) == ((7, 9, 12), (0.875, 0.625, 0.125))
    assert TransPrune().schedule(LOW, 32) == ((7, 9, 12), (0.5, 0.25, 0.0625))
    assert TransPrune.card.retain == HIGH


@pytest.mark.parametrize(("retain", "printed"), [(HIGH, 1.56), (LOW, 1.19)])
def test_published_flops(retain: float, printed: float) -> None:
    """LLaVA-1.5-7B, 576 visual tokens: 4nd^2 + 2n^2d + 3ndm a layer, 3.82 TFLOPs untouched."""

    def teraflops(lengths: list[int]) -> float:
        d, m = 4096, 11008
        return sum(4 * n * d * d + 2 * n * n * d + 3 * n * d * m for n in lengths) / 1e12

    layers, shares = TransPrune().schedule(retain, 32)
    lengths = [576] * 32
    for layer, share in zip(layers, shares, strict=True):
        lengths[layer:] = [int(576 * share)] * (32 - layer)
    assert round(teraflops([576] * 32), 2) == 3.82
    assert round(teraflops(lengths), 2) == printed


@pytest.mark.parametrize("num_layers", [4, 24, 28, 32, 80])
@pytest.mark.parametrize("retain", [0.95, 0.5, 0.41, 0.3, 0.2, 0.1, 0.05])
def test_the_budget_is_the_mean_share(num_layers: int, retain: float) -> None:
    layers, shares = TransPrune().schedule(retain, num_layers)
    least = 1 / num_layers
    assert mean_share(layers, shares, num_layers) == pytest.approx(max(retain, least), abs=1e-6)
    assert list(shares) == sorted(shares, reverse=True) and all(0 <= s <= 1 for s in shares)
    assert set(layers) <= set(TransPrune().decoder_layers(num_layers))
    observed = set(TransPrune().observe_layers(num_layers))
    assert set(range(layers[0] - 1, layers[-1])) <= observed


def test_cuts_move_forward_only_below_the_published_schedules() -> None:
    firsts = [TransPrune().schedule(r / 100, 32)[0][0] for r in range(4, 100)]
    assert firsts == sorted(firsts) and firsts[0] == 1 and set(firsts[28:]) == {7}


@pytest.mark.parametrize(("layer", "kept"), [(7, 35), (9, 25), (12, 5)])
def test_counts(layer: int, kept: int) -> None:
    visual_N = torch.arange(3, 43)
    context = context_of(normal(50).abs(), normal(50), visual_N, layer)
    reduction = TransPrune().decoder(Tokens(normal(1, 40, 4)), context)
    assert reduction is not None and reduction.num_out == kept
    chosen = reduction.anchor_BM[0].tolist()
    assert chosen == sorted(set(chosen))


@pytest.mark.parametrize("seen", ["transition", "attention"])
def test_the_needle_survives_the_last_cut(seen: str) -> None:
    transition_S, keys_S = 1 + 0.01 * normal(50), 0.1 * normal(50, seed=1)
    transition_S[3 + 17], keys_S[3 + 17] = 0.5, -2.0
    (transition_S if seen == "transition" else keys_S)[3 + 17] = 8.0
    context = context_of(transition_S, keys_S, torch.arange(3, 43), 12)
    reduction = TransPrune().decoder(Tokens(normal(1, 40, 4)), context)
    assert reduction is not None and 17 in reduction.anchor_BM[0].tolist()
    # What the other score alone would keep does not know of it.
    blind = TransPrune(alpha=0.0 if seen == "transition" else 1.0)
    reduction = blind.decoder(Tokens(normal(1, 40, 4)), context)
    assert reduction is not None and 17 not in reduction.anchor_BM[0].tolist()


def test_all_shares_of_one_change_nothing() -> None:
    method = TransPrune(shares=(1.0, 1.0, 1.0))
    context = context_of(normal(50).abs(), normal(50), torch.arange(3, 43))
    assert method.decoder(Tokens(normal(1, 40, 4)), context) is None
    full = context_of(normal(50).abs(), normal(50), torch.arange(3, 43), budget=Budget(retain=1.0))
    assert TransPrune().decoder(Tokens(normal(1, 40, 4)), full) is None
    elsewhere = context_of(normal(50).abs(), normal(50), torch.arange(3, 43), layer=8)
    assert TransPrune().decoder(Tokens(normal(1, 40, 4)), elsewhere) is None


def test_an_image_at_the_end_is_ranked_by_its_last_token() -> None:
    keys_S = torch.zeros(9)
    keys_S[4] = 9.0
    context = context_of(torch.ones(9), keys_S, torch.arange(2, 9), 12)
    reduction = TransPrune().decoder(Tokens(normal(1, 7, 4)), context)
    assert reduction is not None and reduction.anchor_BM.tolist() == [[2]]


def test_layers_outside_the_budget_are_not_observed() -> None:
    x_1SD = normal(1, 5, 4)

    def noted(layer: int, retain: float) -> bool:
        context = ModuleContext(Budget(retain=retain), layer=layer, num_layers=32, num_visual=4)
        return TransPrune().observe(x_1SD, x_1SD, context) is not None

    assert [layer for layer in range(32) if noted(layer, HIGH)] == [6, 7, 8, 9, 10, 11]
    assert [layer for layer in range(32) if noted(layer, 0.1)] == [0, 1, 2]


def test_depth() -> None:
    assert TransPrune().cuts(1) == () == TransPrune().decoder_layers(1)
    assert TransPrune().observe_layers(1) == () and TransPrune().schedule(0.5, 1) == ((), ())
    assert TransPrune(layers=(0.25, 0.5, 0.75)).cuts(8) == (2, 4, 6)
    assert TransPrune(layers=[5, 7], shares=[0.5, 0.1]).schedule(0.9, 8) == ((5, 7), (0.5, 0.1))
    assert TransPrune(first=2).observe_layers(32) == tuple(range(12))
    assert TransPrune(first=2, shares=(0.5, 0.25, 0.1)).observe_layers(32) == tuple(range(2, 12))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 1.5}, "alpha"),
        ({"shares": (0.5, 0.7, 0.1)}, "never rise"),
        ({"shares": ()}, "never rise"),
        ({"shares": (0.5, 0.2)}, "need 3 shares"),
        ({"layers": (5,)}, "need 1 shares"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransPrune(**arguments)


def test_layers_must_exist_and_rise() -> None:
    with pytest.raises(ValueError, match="layers = 40 does not exist"):
        TransPrune(layers=(7, 9, 40)).check(None, 32)
    for layers in ((0, 1, 2), (7, 7, 9)):
        with pytest.raises(ValueError, match="must rise"):
            TransPrune(layers=layers).check(None, 32)
