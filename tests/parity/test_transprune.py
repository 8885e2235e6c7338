"""TransPrune against the official code."""

from __future__ import annotations

import torch

from foveate import ops
from foveate.core import AttentionView, Budget, DecoderContext, ModuleContext, Tokens
from foveate.methods.transprune import TransPrune

from .golden_cases import Case, cases

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def method_of(case: Case) -> TransPrune:
    """The case's settings; its layer numbers count from 1, so "7" is cut before index 7."""
    return TransPrune(
        layers=tuple(case.args["prune_layers"]),
        shares=tuple(case.args["keep_ratios_of_original"]),
        first=case.args["accumulate_layers"][0] - 1,
        alpha=case.args["alpha"],
    )


def observed(case: Case, layer: int) -> list[torch.Tensor]:
    """What the method notes of the attention and of the MLP of layer index `layer`."""
    method, budget = method_of(case), Budget(retain=0.4)
    noted = []
    for module in ("attn", "ffn"):
        taps = (case[f"L{layer + 1}_{module}_{way}"] for way in ("in", "out"))
        context = ModuleContext(budget, layer=layer, num_layers=32, num_visual=case.args["n_image"])
        value_S = method.observe(*taps, context)
        assert value_S is not None
        noted.append(value_S)
    return noted


@cases("transprune")
def test_transitions(case: Case) -> None:
    accumulated = [layer - 1 for layer in case.args["accumulate_layers"]]
    assert list(method_of(case).observe_layers(32)) == accumulated
    for layer in accumulated:
        both_S = torch.stack(observed(case, layer)).sum(0)
        torch.testing.assert_close(both_S, case[f"L{layer + 1}_ttv"][0], **CLOSE)


@cases("transprune")
def test_cuts(case: Case) -> None:
    """Scores, kept tokens and the order of the rest, cut by cut."""
    method, system = method_of(case), case.args["n_system"]
    alive_S = torch.arange(system + case.args["n_image"] + case.args["n_text"])
    seen: dict[int, torch.Tensor] = {}
    for layer in range(max(case.args["prune_layers"]) + 1):
        if layer in method.decoder_layers(32):
            alive_S = check_cut(case, method, layer, alive_S, seen)
        if layer in method.observe_layers(32):
            seen[layer] = alive_S


def check_cut(
    case: Case,
    method: TransPrune,
    layer: int,
    alive_S: torch.Tensor,
    seen: dict[int, torch.Tensor],
) -> torch.Tensor:
    name, system, num_text = f"P{layer}_", case.args["n_system"], case.args["n_text"]
    num = len(alive_S) - system - num_text
    visual_N = torch.arange(system, system + num)
    view = AttentionView(
        case[name + "q_rot"][None],
        case[name + "k_rot"][None],
        case.args["head_dim"] ** -0.5,
        visual_N,
    )

    def kept(earlier: int, module: str) -> torch.Tensor:
        value_S = observed(case, earlier)[("attention", "mlp").index(module)]
        return value_S[torch.searchsorted(seen[earlier], alive_S)]

    context = DecoderContext(
        Budget(retain=0.4),
        layer=layer,
        num_layers=32,
        num_visual=case.args["n_image"],
        num_text=num_text + system,
        visual_N=visual_N,
        attention_ahead=lambda: view,
        observed=kept,
        id_S=alive_S,
        span_I2=torch.tensor([[system, system + case.args["n_image"] - 1]]),
    )
    assert len(context.after_R) == num_text and len(context.before_R) == system
    transition_S = sum(kept(a, m) for a in seen for m in ("attention", "mlp"))
    attention_N = view.mean_of_last(num_text)[0][visual_N]
    assert isinstance(transition_S, torch.Tensor)
    score_N = method.score(transition_S[visual_N], attention_N)
    torch.testing.assert_close(2 * score_N, case[name + "score"], **CLOSE)
    for part, stored in ((transition_S[visual_N], "ttv_norm"), (attention_N, "iga_norm")):
        torch.testing.assert_close(part / part.sum(), case[name + stored], **CLOSE)
    tokens = Tokens(case[name + "hidden"][:, visual_N])
    reduction = method.decoder(tokens, context)
    assert reduction is not None
    kept_K = reduction.anchor_BM[0]
    assert (kept_K + system).tolist() == case[name + "kept_index"].tolist()
    assert torch.equal(ops.top_k(case[name + "score"], len(kept_K)), kept_K)
    rest_S = torch.cat([alive_S[:system], alive_S[system + kept_K], alive_S[system + num :]])
    assert rest_S.tolist() == case[name + "kept_original"].tolist()
    # Renumbered from 0 on, which the class asks for.
    assert case[name + "position_ids"][0].tolist() == list(range(len(rest_S)))
    assert method.renumbers
    return rest_S
